"""The way from a corpus's records to the documents of a dataset, stage by stage, from the figures in its card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatrain.data.card import Card


@dataclass
class Stage:
    """What a stage took and what it left, in documents, and in bytes of text where they were counted.

    `reasons` counts the removed documents by rule. `changed` documents were kept with another text, and `changes`
    counts what the stage says it changed or found. `is_step` says that it is a cleaning step, or cuts passages.
    """

    name: str
    documents_in: int
    documents_out: int
    bytes_in: int | None = None
    bytes_out: int | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    is_step: bool = False
    added: int = 0

    @property
    def removed(self) -> int:
        """Documents that came and did not stay. `added` are originals that stayed beside their augmented documents."""
        return self.documents_in + self.added - self.documents_out


def funnel(card: Card) -> list[Stage]:
    """Return the stages in order. Empty for data that came as token ids, of whose text nothing is known.

    Stages that removed nothing are left out, except for cleaning steps.
    """
    if "read" not in card.counts:
        return []
    stages: list[Stage] = []
    left = sum(card.counts.get(name, 0) for name in ("read", "left_out", "oversized"))
    for name, removed, reasons in _before(card.counts):
        stages += [Stage(name, left, left - removed, reasons=reasons)] if removed else []
        left -= removed
    for step in card.cleaning:
        stages.append(_step(step))
        left = stages[-1].documents_out
    for name, count in _AFTER.items():
        if name == _ONCE_CUT and card.duplicate_passages:
            stages.append(_step(card.duplicate_passages))
            left = stages[-1].documents_out
        removed = card.counts.get(count, 0)
        stages += [Stage(name, left, left - removed)] if removed else []
        left -= removed
    kept = sum(split.documents for split in card.splits.values()) - card.counts.get("cut_in_two", 0)
    if left != kept:
        stages.append(Stage("other", left, kept))
    return stages


_ONCE_CUT = "exact duplicates once cut"
_AFTER = {
    "emptied by cleaning": "emptied",
    "exact duplicates": "duplicates",
    "near_duplicates": "near_duplicates",
    _ONCE_CUT: "duplicates_once_cut",
}
"""The stages after cleaning, and the counts of what they removed."""


def _before(counts: dict[str, int]) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Yield the stages before cleaning: name, removed records, and these by reason."""
    bad = _by_reason(counts, "bad_")
    if undecodable := counts.get("skipped_undecodable", 0):
        bad["undecodable"] = undecodable
    yield "no documents", counts.get("left_out", 0), _by_reason(counts, "left_out_")
    yield "too large", counts.get("oversized", 0), {}
    yield "bad records", counts.get("bad", 0) + undecodable, bad
    yield "empty", counts.get("empty", 0), {}


def _by_reason(counts: dict[str, int], prefix: str) -> dict[str, int]:
    """Return the counts whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix) and count}


def _step(report: dict[str, Any]) -> Stage:
    """Return the stage of a cleaning step from the fields of its `StepReport`."""
    return Stage(
        report["name"],
        report["documents_in"],
        report["documents_out"],
        report["bytes_in"],
        report["bytes_out"],
        dict(report["rules"]),
        report["changed"],
        dict(report["changes"]),
        is_step=True,
        added=report.get("added", 0),
    )
