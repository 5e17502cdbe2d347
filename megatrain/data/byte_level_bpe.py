"""Byte-level BPE by tiktoken: the ids of the `tokenizers` library, several times faster, where that is proven.

A definition qualifies if it is byte-level BPE without a normaliser, whose merges come in the order of their ids, and
whose text is cut by one regular expression. tiktoken and `tokenizers` then agree but for characters that their versions
of Unicode class differently, and but for vocabularies with rare orders of merges. Made words are tried at the start,
and each character when it is first met; what differs is left to `tokenizers`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the ByteLevel pre-tokenizer cuts text by itself (Radford et al. 2019, encoder.py of GPT-2)."""

_MOST_APART = 4096  # characters; more of them mean that the engines do not agree
_MADE_TEXTS = 2000

Encode = Callable[[str], Sequence[int]]


class ByteLevelBpe:
    """tiktoken's engine for one definition, checked against `encode` of the `tokenizers` library.

    Raises `ValueError` with the reason if the definition does not qualify or made texts are encoded differently.
    """

    def __init__(self, definition: str, encode: Encode) -> None:
        import tiktoken

        content = json.loads(definition)
        model = content["model"]
        _check(content, model)
        alphabet = {letter: byte for byte, letter in enumerate(byte_letters())}
        added = [token["content"] for token in content.get("added_tokens", [])]
        ranks = _ranks(model, alphabet, set(added))
        pattern = _split_pattern(content["pre_tokenizer"])
        self._encoding = tiktoken.Encoding("megatrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._encode = encode
        self._added = _any_of(token["content"] for token in content.get("added_tokens", []) if not token["special"])
        self._tried: set[str] = set()
        self._apart: set[str] = set()
        self._try_characters(set(map(chr, range(128))))
        self._try_words([word for word in map(_text, ranks) if word])

    def __call__(self, text: str) -> np.ndarray | None:
        """Return the token ids (uint32) of a text; None if it has something that is left to `tokenizers`."""
        if self._added is not None and self._added.search(text):
            return None
        if self._apart or not text.isascii():
            letters = set(text)
            if new := letters - self._tried:
                self._try_characters(new)
            if len(self._apart) > _MOST_APART or not self._apart.isdisjoint(letters):
                return None
        return self._fast(text)

    def _fast(self, text: str) -> np.ndarray:
        found: np.ndarray = self._encoding.encode_to_numpy(text, disallowed_special=())
        return found

    def _try_characters(self, letters: set[str]) -> None:
        self._tried |= letters
        self._apart.update(self._differing(sorted(letters)))

    def _try_words(self, words: list[str]) -> None:
        chosen = random.Random(0)
        for _ in range(_MADE_TEXTS):
            text = "".join(chosen.choices(words, k=12))
            if (found := self(text)) is not None and found.tolist() != list(self._encode(text)):
                raise ValueError(f"the text {text!r} is encoded differently")

    def _differing(self, letters: list[str]) -> list[str]:
        """Return the characters whose ids differ, after a letter, before a digit, after a space and doubled."""
        text = "".join(f"x{letter}1 {letter}{letter}\n" for letter in letters)
        if self._fast(text).tolist() == list(self._encode(text)):
            return []
        if len(letters) == 1:
            return letters
        half = len(letters) // 2
        return self._differing(letters[:half]) + self._differing(letters[half:])


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    parts = [re.escape(token) for token in tokens]
    return re.compile("|".join(parts)) if parts else None


def byte_letters() -> str:
    """Return the letter that stands for each byte in byte-level vocabularies: itself if it is visible, else the next
    free one from U+0100 on (GPT-2's encoder.py)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return "".join(chr(byte) if byte in visible else chr(next(others)) for byte in range(256))


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""


def _check(content: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise `ValueError` unless the definition is plain BPE."""
    if model.get("type") != "BPE":
        raise ValueError(f"the model is {model.get('type')}, not BPE")
    if content.get("normalizer"):
        raise ValueError("it has a normaliser")
    for setting in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(setting):
            raise ValueError(f"its model has {setting}")


def _ranks(model: dict[str, Any], alphabet: dict[str, int], added: set[str]) -> dict[bytes, int]:
    """Return the id of each token that text can become: single bytes and results of merges."""
    vocabulary: dict[str, int] = model["vocab"]
    if not all(letter in vocabulary for letter in alphabet):
        raise ValueError("its vocabulary lacks some bytes")
    tokens = {letter: vocabulary[letter] for letter in alphabet}
    last = -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        joined = left + right
        if joined not in vocabulary or joined in tokens or vocabulary[joined] <= last:
            raise ValueError("its merges are not in the order of their ids")
        tokens[joined] = last = vocabulary[joined]
    if model.get("ignore_merges") and (whole := vocabulary.keys() - tokens.keys() - added):
        raise ValueError(f"no merge makes its token {min(whole)!r}, which it finds whole")
    return {bytes(alphabet[letter] for letter in token): number for token, number in tokens.items()}


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return the regular expression by which text is cut."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    last: dict[str, Any] = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError("it is not plain byte-level BPE")
    if len(parts) == 1 and last.get("use_regex", True):
        return _GPT2_SPLIT
    split: dict[str, Any] = parts[0] if len(parts) == 2 else {}
    pattern = split.get("pattern", {}).get("Regex")
    if last.get("use_regex", True) or split.get("behavior") != "Isolated" or split.get("invert") or not pattern:
        raise ValueError("its text is not cut by one regular expression")
    return str(pattern)
