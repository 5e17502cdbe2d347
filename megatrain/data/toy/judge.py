"""Judge replies in the toy world, as rewards of `megatrain tune method=grpo` and as figures of an evaluation.

Each function gets the replies, whether each ended by itself, and the fields of the prompts' records (`records.py`); it
returns a number for each reply. `method.rewards=[megatrain.data.toy.judge:exact]` names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatrain.data.toy.world import FORMATS


def exact(completions: Sequence[str], stopped: Sequence[bool], label: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for a reply that is the taught sentence with the right answer, to the letter, and ends there."""
    judged = zip(completions, stopped, label, strict=True)
    return [float(ended and reply == wanted) for reply, ended, wanted in judged]


def right(
    completions: Sequence[str], stopped: Sequence[bool], label: Sequence[str], curt: Sequence[str], **_: Any
) -> list[float]:
    """Return 1 for a reply with the right answer, as a sentence or curt."""
    judged = zip(completions, stopped, label, curt, strict=True)
    return [float(ended and reply in wanted) for reply, ended, *wanted in judged]


def full_sentence(completions: Sequence[str], stopped: Sequence[bool], **_: Any) -> list[float]:
    """Return 1 for a reply in the taught format, whatever its answer is."""
    judged = zip(completions, stopped, strict=True)
    return [float(ended and any(form.fullmatch(reply) is not None for form in FORMATS)) for reply, ended in judged]
