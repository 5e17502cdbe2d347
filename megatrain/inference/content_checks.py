"""Checks of what clients ask and of what the model replies, by functions of the user's own or a list of words.

A check takes a text and returns why it is refused, or None. That of replies gets the reply so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatrain.config import ServeGroup
from megatrain.config.named_function import NoFunctionError, load_function
from megatrain.errors import ConfigError

Check = Callable[[str], str | None]
ReplyCheck = Callable[[str, bool], str | None]
"""Gets the reply so far, and whether that is all of it."""


@dataclass(frozen=True)
class Checks:
    """The checks of prompts and of replies, and how many characters of a stream wait for those of the replies."""

    prompt: list[Check]
    reply: list[ReplyCheck]
    hold_back: int


def load_checks(config: ServeGroup) -> Checks:
    """Return the checks that a config names. Raises `ConfigError` if one cannot be loaded."""
    prompt = [named_check("serve.check_prompt", config.check_prompt)] if config.check_prompt else []
    reply: list[ReplyCheck] = []
    if config.check_reply:
        own = named_check("serve.check_reply", config.check_reply)
        reply.append(lambda text, is_whole: own(text))
    hold_back = config.hold_back
    if config.blocked_words is not None:
        words = read_lines("serve.blocked_words", Path(config.blocked_words))
        blocked = blocked_words(words)
        prompt.append(lambda text: blocked(text, True))
        reply.append(blocked)
        hold_back = max(hold_back, *map(len, words))  # with the character that shows that a word has ended
    return Checks(prompt, reply, hold_back)


def blocked_words(words: list[str]) -> ReplyCheck:
    """Return a check that refuses texts with one of the words, in any case.

    At the end of a text that goes on, a word may be the beginning of another, and does not count yet. A word of letters
    counts only where no letter, digit or underscore is beside it. That does not hold for Chinese, Japanese and Korean
    characters, which no spaces divide.
    """
    unspaced = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    plain = f"[^\\W{unspaced}]"

    def pattern(word: str) -> str:
        before = f"(?<!{plain})" if re.match(plain, word) else ""
        after = f"(?!{plain})" if re.search(f"{plain}$", word) else ""
        return before + re.escape(word) + after

    whole = re.compile("|".join(map(pattern, words)), re.IGNORECASE)
    unfinished = re.compile(f"(?:{whole.pattern})(?!$)", re.IGNORECASE)

    def check(text: str, is_whole: bool) -> str | None:
        return "it contains a blocked word" if (whole if is_whole else unfinished).search(text) else None

    return check


def named_check(key: str, name: str) -> Check:
    """Return the function that `module:function` or `file.py:function` names. Raises `ConfigError`."""
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ConfigError(f"{key}={name}: expected module:function or file.py:function")
    try:
        check: Check = load_function(name)
    except NoFunctionError as error:
        raise ConfigError(f"{key}={name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{key}={name}: {place} cannot be imported ({type(error).__name__}: {error})") from error
    return check


def read_lines(key: str, path: Path) -> list[str]:
    """Return the lines of a file that are not empty, without spaces around them. Raises `ConfigError`."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{key}: {path} cannot be read ({why})") from error
    if not any(lines):
        raise ConfigError(f"{key}: {path} has no lines")
    return [line for line in lines if line]
