"""Facts about numbers: what they ask, what is right, and how prose and chats say it. Writes no files.

Each fact is of one of five skills and in one of two languages. Whether a fact is held out follows from its numbers
alone, so no text, conversation or prompt of training has the numbers of a question that a model is tested with.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

LANGUAGES = ("en", "zh")

_ABOUT = {
    "en": {
        "reverse": "the reverse of {x}",
        "sort": "the sorted digits of {x}",
        "larger": "the larger of {a} and {b}",
        "next": "the number after {n}",
        "last": "the last digit of {x}",
    },
    "zh": {
        "reverse": "{x}的倒序",
        "sort": "{x}的升序",
        "larger": "{a}和{b}中大的数",
        "next": "{n}的下一个数",
        "last": "{x}的末位",
    },
}
SKILLS = tuple(_ABOUT["en"])

# What comes before and after a fact varies, because a model that learned distances within one sentence loses the skill
# as soon as a chat template shifts them.
_OPENINGS = {
    "en": ("What is ", "Find ", "Give ", "So ", "Now ", "Then ", ""),
    "zh": ("请问", "求", "写出", "那么", "现在", "然后", ""),
}
_LINKS = {
    "en": ("?", " is", ":", " =", " gives", "? The answer is", "? Answer:", "? That is"),
    "zh": ("是多少?", "是", ":", "=", "等于", "?答案是", "?答:", "?就是"),
}
_QUESTION = {"en": "What is {}?", "zh": "请问{}是多少?"}
_SENTENCE = {"en": "The answer is {}.", "zh": "答案是{}。"}
_STOP = {"en": ".", "zh": "。"}
_GAP = {"en": " ", "zh": ""}

FORMATS = tuple(re.compile(re.escape(form).replace(r"\{\}", r"\d+")) for form in _SENTENCE.values())
"""What replies in the taught format look like, whatever their answer is."""

HELDOUT = 10
"""One in so many numbers is held out."""


@dataclass(frozen=True)
class Fact:
    """One fact: its skill, language, what it is about (`the reverse of 8763`), what is right (`3678`)."""

    skill: str
    language: str
    about: str
    answer: str
    heldout: bool

    def question(self) -> str:
        """Return what a user asks."""
        return _QUESTION[self.language].format(self.about)

    def sentence(self, answer: str | None = None) -> str:
        """Return the reply in the taught format, or the same with another answer."""
        return _SENTENCE[self.language].format(self.answer if answer is None else answer)

    def curt(self) -> str:
        """Return the right answer without the sentence."""
        return self.answer + _STOP[self.language]

    def wrong(self, rng: random.Random) -> str:
        """Return the sentence with one digit of the answer changed."""
        place = rng.randrange(len(self.answer))
        digit = rng.choice([d for d in "0123456789" if d != self.answer[place]])
        return self.sentence(self.answer[:place] + digit + self.answer[place + 1 :])

    def opening(self, rng: random.Random) -> str:
        """Return how a line of prose begins, up to the answer."""
        return rng.choice(_OPENINGS[self.language]) + self.about + rng.choice(_LINKS[self.language])

    def line(self, rng: random.Random) -> str:
        """Return a line of prose that states the fact."""
        return self.opening(rng) + _GAP[self.language] + self.curt()


def draw(
    count: int, seed: int, *, heldout: bool = False, languages: Sequence[str] = LANGUAGES, skill: str | None = None
) -> list[Fact]:
    """Return `count` facts, the same for the same arguments. Held-out ones go through skills and languages in turn."""
    rng = random.Random(f"{seed} {heldout}")
    kinds = [(s, language) for s in SKILLS for language in languages if skill in (None, s)]
    facts: list[Fact] = []
    while len(facts) < count:
        wanted, language = kinds[len(facts) % len(kinds)] if heldout else rng.choice(kinds)
        fact = _fact(wanted, language, rng)
        if fact.heldout == heldout:
            facts.append(fact)
    return facts


def _fact(skill: str, language: str, rng: random.Random) -> Fact:
    a, b, n = rng.randrange(10, 100), rng.randrange(10, 100), rng.randrange(100, 1000)
    x = "".join(rng.choice("0123456789") for _ in range(4))
    answer = {
        "reverse": x[::-1],
        "sort": "".join(sorted(x)),
        "larger": str(max(a, b)),
        "next": str(n + 1),
        "last": x[-1],
    }[skill]
    numbers = {"larger": f"{a},{b}", "next": str(n)}.get(skill, x)
    about = _ABOUT[language][skill].format(a=a, b=b, n=n, x=x)
    return Fact(skill, language, about, answer, zlib.crc32(numbers.encode()) % HELDOUT == 0)
