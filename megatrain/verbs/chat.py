"""`megatrain chat`: talk with a model, by the chat template of its tokenizer. `model/sampling.py` samples."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatrain.config import ChatConfig
from megatrain.data.chat.conversation import Message
from megatrain.data.chat.template import ChatTemplate
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError
from megatrain.interop.load_model import load
from megatrain.model.gpt import GPT
from megatrain.model.sampling import generate as sample
from megatrain.verbs.generate import decode, print_text, read_text

NEW = "/new"
"""What a user types to begin another conversation."""
_COMMANDS = f"{NEW} begins another conversation, Ctrl-D ends"


def chat(config: ChatConfig) -> None:
    """Answer `config.prompt` on standard output; without one, answer each line that is typed or read, until the end.

    Raises:
        ConfigError: a message is not text, the conversation is longer than the model takes, or the model's tokenizer
            has no chat template.
        CheckpointError: there is no intact model.
    """
    loaded = load(Path(config.path), config.step)
    tokenizer = loaded.need_tokenizer()
    if tokenizer.chat_template() is None:
        raise ConfigError(
            f"{config.path}: was not tuned on conversations, as its tokenizer has no chat template; megatrain generate "
            "continues text, and megatrain prepare data=chat begins the way to a model that answers"
        )
    template = ChatTemplate(tokenizer)
    model = loaded.build(device_by_name(config.device))
    ends = [*template.ends(), *loaded.end_tokens()]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal shows `?` for a character it does not have
    if config.prompt is not None:
        _answer(model, template, ends, [*_beginning(config), _user("prompt", config.prompt)], config, 0)
        return
    with contextlib.suppress(KeyboardInterrupt) if sys.stdin.isatty() else contextlib.nullcontext():
        _talk(model, template, ends, config)  # on a terminal Ctrl-C is one way to end a conversation


def _talk(model: GPT, template: ChatTemplate, ends: list[int], config: ChatConfig) -> None:
    """Answer lines of standard input. A message for which a conversation has become too long is not added to it."""
    messages = _beginning(config)
    for number, line in enumerate(_lines()):
        if line.strip() == NEW:
            messages = _beginning(config)
            continue
        if sys.stdin.isatty() and re.fullmatch(r"/\w+", line.strip()):
            print(f"megatrain: no command {line.strip()}; {_COMMANDS}", file=sys.stderr)
            continue
        if not line.strip():
            continue
        try:
            asked = [*messages, _user("message", line)]
            reply = _answer(model, template, ends, asked, config, number)
        except ConfigError as error:
            if not sys.stdin.isatty():
                raise
            print(f"megatrain: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": reply}]


def _lines() -> Iterator[str]:
    """Yield what the user types, or the lines that are read, without their ends."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, arrow keys and earlier lines
    print(f"Type a message; {_COMMANDS}", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _beginning(config: ChatConfig) -> list[Message]:
    return [] if config.system is None else [{"role": "system", "content": read_text("system", config.system)}]


def _user(key: str, text: str) -> Message:
    return {"role": "user", "content": read_text(key, text)}


def _answer(
    model: GPT, template: ChatTemplate, ends: Sequence[int], messages: list[Message], config: ChatConfig, number: int
) -> str:
    """Print the reply to a conversation while it is sampled, and return it. Raises ConfigError if that is too long."""
    ids = template.encode(messages, asks=True).ids
    longest = model.config.max_seq_len
    if len(ids) >= longest:
        raise ConfigError(
            f"the conversation has {len(ids)} tokens, and the model takes at most {longest} (model.max_seq_len); "
            f"shorten it, or begin another ({NEW})"
        )
    sampled = sample(
        model,
        ids,
        max_new_tokens=min(config.max_new_tokens, longest - len(ids)),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed + number,
        stop_ids=ends,
    )
    reply = ""
    for piece in decode(sampled, template.tokenizer, ()):
        print_text(piece)
        reply += piece
    print_text("\n")
    return reply.strip()
