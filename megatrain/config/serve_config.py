"""`serve.*`: the server of a trained model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class ServeGroup:
    """The server: its address, who may ask how much, and how replies are computed."""

    backend: str = key(
        "embedded",
        "who computes replies: embedded (this program) or vllm (vLLM's own server)",
        choices=("embedded", "vllm"),
    )
    vllm_command: list[str] = key(
        [], "backend=vllm: words that start its server, of any environment; empty: vllm serve of this Python"
    )
    vllm_args: list[str] = key([], "backend=vllm: more arguments of vllm serve, such as --dtype=bfloat16")
    vllm_start_s: float = key(
        1800.0, "backend=vllm: longest time until it takes requests, in seconds", above=0, maximum=1e7
    )
    export_dir: str | None = key(
        None,
        "backend=vllm: where exported models are kept; null: exported/ in a run, or beside a checkpoint",
        path=True,
    )
    host: str = key("127.0.0.1", "address to listen on; 0.0.0.0 is every address of this machine")
    port: int = key(8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    workers: int = key(1, "processes behind the address, each with the model; a dead one is replaced", minimum=1)
    model_name: str | None = key(None, "name of the model for clients; null takes that of its folder")
    api_key: str | None = key(None, "key that clients must send; null asks for none, unless api_key_file is given")
    api_key_file: str | None = key(None, "file with the keys of clients, one a line", path=True)
    max_concurrent: int = key(8, "replies that are computed at once", minimum=1)
    max_context: int | None = key(
        None,
        "longest prompt with its reply, in tokens; null takes model.max_seq_len. Each reply's cache has that room",
        minimum=1,
    )
    precision: str | None = key(
        None,
        "number format of weights, cache and sums in between; null: fp32 on a CPU and with int8 or int4 weights, "
        "else bf16, which halves the memory and rounds to 8 bits",
        choices=("fp32", "bf16", None),
    )
    max_queue: int = key(64, "replies that may wait for their turn; further requests get status 429", minimum=0)
    max_prompt_tokens: int | None = key(None, "longest prompt; null allows model.max_seq_len", minimum=1)
    max_new_tokens: int = key(512, "longest reply in tokens, and the default of chats", minimum=1)
    max_body_bytes: int = key(2**20, "largest body of a request, in bytes", minimum=1)
    trusted_proxies: list[str] = key(
        [], "addresses and networks, such as 10.0.0.0/8, of proxies whose X-Forwarded-For names the client's address"
    )
    requests_per_minute: int | None = key(
        None, "requests per minute and key, or client's address; null: any", minimum=1
    )
    tokens_per_minute: int | None = key(
        None, "tokens of prompts and replies per minute and key, or client's address; null: any", minimum=1
    )
    timeout_s: float = key(120.0, "longest time for a request, in seconds", above=0, maximum=1e7)
    step_timeout_s: float = key(
        60.0,
        "longest time for a step of the model, in seconds; then /health fails, and replies that run are given up",
        above=0,
        maximum=1e7,
    )
    grace_s: float = key(
        30.0, "longest time after TERM or Ctrl-C until what runs is finished, in seconds", minimum=0, maximum=1e7
    )
    prompt_chunk: int = key(512, "tokens of prompts that are computed between two tokens of the replies", minimum=1)
    reuse_prefixes: bool = key(True, "keep keys and values of prompts, for others that begin alike")
    check_prompt: str | None = key(
        None, "function that may refuse a prompt: module:function or file.py:function; gets text, returns why, or None"
    )
    check_reply: str | None = key(None, "function that may cut a reply short; as check_prompt, with the reply so far")
    blocked_words: str | None = key(
        None, "file with words, one a line, that no prompt and no reply may contain", path=True
    )
    hold_back: int = key(0, "characters of a streamed reply that check_reply sees before the client does", minimum=0)
    check_timeout_s: float = key(
        5.0, "longest time for a check, in seconds; then its process is started again", above=0, maximum=1e7
    )
    check_processes: int = key(2, "processes that run the checks, of prompts, replies and blocked words", minimum=1)
