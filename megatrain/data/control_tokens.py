"""Which ids of a Hugging Face tokenizer are control tokens, and a definition in which no text can spell them.

`encode_special_tokens` of the library is not enough: it heeds a flag that a tokenizer.json may lack, and a name that is
also a piece of the model's vocabulary is found by the model itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def control_ids(tokenizer: Any, named: list[str]) -> frozenset[int]:
    """Return the ids of tokens with the flag `special` and of `named` tokens.

    A named token of one character that was not added to the vocabulary is ordinary text (CLIP pads with `!`).
    """
    added = tokenizer.get_added_tokens_decoder()
    found = {token_id for token_id, token in added.items() if token.special}
    for name in named:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None and (token_id in added or len(name) > 1):
            found.add(token_id)
    return frozenset(found)


def unknown_id(tokenizer: Any, definition: str) -> int | None:
    """Return the id that the model gives to characters it does not know, None if it has none."""
    model = json.loads(definition)["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token_id: int | None = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return token_id


def probes(names: list[str]) -> Iterator[str]:
    """Yield texts that spell control tokens, alone, doubled and amid words, and one of unusual characters."""
    if names:
        yield " ".join(names)
        yield "".join(f"{name}{name}\n{name}a b{name}" for name in names)
    yield "\u0378 \ue123 \U0001f9ff \u16a0\U000e0041 \u05d0\u4e00"


def spellings(name: str, spelling: str) -> Iterator[str]:
    """Yield texts of which the token `name`, decoded as `spelling`, may be a piece.

    A piece of one character, or such as `<0x0A>`, may stand for a byte, so the texts then have every byte of UTF-8.
    """
    for text in (name, spelling):
        yield from (text, f"a{text}b")
    if len(name) == 1 or name.startswith("<0x"):
        yield from (f"a{chr(code)}b" for code in range(0x80))
        yield from (chr(code) for code in (*range(0x80, 0x800, 0x40), *range(0x80, 0xC0), *range(0x1000, 0x1040)))
        yield from (chr(code) for code in (*range(0x800, 0xD800, 0x400), 0xE000, 0xF000))
        yield from (chr(code) for code in (*range(0x10000, 0x110000, 0x30000), 0x100000))


def unspellable(definition: str, names: set[str]) -> str:
    """Return the definition with the tokens `names` renamed so that clean text, which has no U+0000, cannot spell them.

    Every token keeps its id, so that all other text is encoded as before.
    """
    content = json.loads(definition)
    model = content["model"]

    def renamed(name: str) -> str:
        return f"\0{name}\0" if name in names else name

    for token in content["added_tokens"]:
        token["content"] = renamed(token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed(piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[renamed(piece), score] for piece, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if names.isdisjoint(_merged(merge, prefix))]
    content["post_processor"] = None  # it may name a token, and is never used
    return json.dumps(content)


def _merged(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Return the two parts of a merge and their product."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)
