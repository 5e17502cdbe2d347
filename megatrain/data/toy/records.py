"""The files to tune on: conversations, pairs of replies, and prompts with answers, as JSON lines.

They are what a user's own files would look like, and megatrain reads them like any others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatrain.data.toy.world import Fact, draw

FOLDER = "records"
"""Folder of the files, in the dataset's folder."""

Records = Iterator[dict[str, Any]]


def write_records(folder: Path) -> list[Path]:
    """Write all files into `folder`, which must exist, and return them. They are the same on every machine."""
    written = []
    for name, (make, count, seed) in _FILES.items():
        training, heldout = draw(count, seed), draw(HELDOUT_RECORDS, seed, heldout=True)
        for path, facts in ((folder / f"{name}.jsonl", training), (folder / f"{name}_heldout.jsonl", heldout)):
            _write(path, make(facts, random.Random(seed)))
            written.append(path)
    return written


def chats(facts: list[Fact], rng: random.Random) -> Records:
    """Yield conversations whose replies are full sentences."""
    yield from _talks(facts, rng, lambda fact: fact.sentence())


def styles(facts: list[Fact], rng: random.Random) -> Records:
    """Yield conversations half of whose replies are full sentences, and half curt: a model that has yet to choose."""
    yield from _talks(facts, rng, lambda fact: fact.sentence() if rng.random() < 0.5 else fact.curt())


def pairs(facts: list[Fact], rng: random.Random) -> Records:
    """Yield a right reply and one with a wrong digit."""
    for fact in facts:
        yield _pair(fact, fact.sentence(), fact.wrong(rng))


def style_pairs(facts: list[Fact], rng: random.Random) -> Records:
    """Yield a full sentence and a curt reply, both right."""
    del rng
    for fact in facts:
        yield _pair(fact, fact.sentence(), fact.curt())


def prompts(facts: list[Fact], rng: random.Random) -> Records:
    """Yield questions with the answer that a reply is judged by."""
    del rng
    for fact in facts:
        about = {"skill": fact.skill, "language": fact.language}
        yield {"prompt": fact.question(), "label": fact.sentence(), "curt": fact.curt(), **about}


HELDOUT_RECORDS = 400
"""Questions of each held-out file."""
QUESTIONS = (1, 1, 2, 3)
"""How many questions a conversation has, each number equally likely: the second one must be answered like the first."""
_FILES: dict[str, tuple[Callable[[list[Fact], random.Random], Records], int, int]] = {
    "chats": (chats, 1200, 11),
    "styles": (styles, 2400, 12),
    "pairs": (pairs, 12000, 21),
    "style_pairs": (style_pairs, 1200, 22),
    "prompts": (prompts, 4000, 31),
}
"""Each file's records, how many questions it has, and their seed. Beside each is a file of held-out questions."""


def _talks(facts: list[Fact], rng: random.Random, reply: Callable[[Fact], str]) -> Records:
    left = list(facts)
    while left:
        count = rng.choice(QUESTIONS)
        asked, left = left[:count], left[count:]
        yield {"messages": [said for fact in asked for said in (*_asked(fact), _reply(reply(fact)))]}


def _pair(fact: Fact, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": _asked(fact), "chosen": [_reply(chosen)], "rejected": [_reply(rejected)]}


def _asked(fact: Fact) -> list[dict[str, str]]:
    return [{"role": "user", "content": fact.question()}]


def _reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _write(path: Path, records: Records) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
