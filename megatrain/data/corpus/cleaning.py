"""What a worker does with a chunk of records: decode, normalise, count what is bad. A pure function of the chunk."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.data.corpus.cleaned import describe, pack
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.document import Document, Step
from megatrain.data.corpus.normalise import normalise
from megatrain.data.corpus.recipe import StepReport, new_reports, run_recipe
from megatrain.data.corpus.record import BadRecordError, LeftOutError, Policy, Problem, Record
from megatrain.data.corpus.signatures import Signing, sign
from megatrain.errors import DataError

_COUNTS = ("read", "left_out", "empty", "bad", "undecodable", "skipped_undecodable", "oversized")
KIND = "kind_"
"""The start of the names of counts of documents by what they were read as."""
LEFT_OUT = "left_out"
"""The count of records that are no documents, and the start of the names of their counts by reason."""


@dataclass(frozen=True)
class CleanTask:
    """Records to clean, the policy for bad ones, the recipe, the seed of the documents' draws, how to sign them."""

    records: list[Record]
    policy: Policy
    recipe: tuple[Step, ...]
    seed: int
    signing: Signing | None = None


@dataclass(frozen=True)
class Cleaned:
    """Clean documents as a frame, `describe` of them, their signatures, counts, and what each step did.

    `first_bad` describes the first bad record, and `quarantine` has a line of JSON for each if they are to be kept.
    """

    frame: bytes
    documents: np.ndarray
    signatures: np.ndarray | None
    counts: dict[str, int]
    reports: list[StepReport]
    first_bad: str | None
    quarantine: bytes


def clean_chunk(task: CleanTask) -> Cleaned:
    """Decode, normalise and clean records; empty ones and those that policy or recipe leave out are counted.

    Raises `DataError` for the first bad record if the policy is to stop there.
    """
    texts: list[bytes] = []
    draw_by: list[bytes] = []
    memory: dict[str, Any] = {}
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    reports = new_reports(task.recipe)
    first_bad, quarantine = None, []
    for record in task.records:
        if record.oversized:
            counts["oversized"] += 1
            continue
        if record.left_out:
            _count_left_out(record.left_out, counts)
            continue
        try:
            decoded = decode(record, task.policy)
        except LeftOutError as error:
            _count_left_out(error.reason, counts)
            continue
        except BadRecordError as error:
            problem = error.problem
            counts["read"] += 1
            first_bad = first_bad or f"{record.where}: {problem.message}"
            _count_bad(record, problem, task.policy, counts)
            if task.policy.on_bad_record == "quarantine":
                quarantine.append(_quarantined(record, problem))
            continue
        counts["read"] += 1
        if decoded.kind:
            counts[f"{KIND}{decoded.kind}"] += 1
        counts["undecodable"] += decoded.undecodable
        if not decoded.text:
            counts["empty"] += 1
            continue
        document = Document(decoded.text, decoded.id or record.where, markup=record.markup, metadata=decoded.metadata)
        document.kind, document.memory = decoded.kind, memory
        kept = [document]
        if task.recipe:
            stays = run_recipe(task.recipe, document, reports, task.seed)
            kept = [*document.originals, *([document] if stays else [])]
            if not stays:
                counts["cleaned_away"] += 1
            for one in kept:
                one.text = normalise(one.text)
        family = len(texts)
        for one in kept:
            if not one.text:
                counts["emptied"] += 1
                continue
            if one.markup:
                counts["markup"] += 1
            if one.augmented:
                counts["augmented"] += 1
            texts.append(one.text.encode())
            draw_by.append(texts[family])
    signatures = sign([text.decode() for text in texts], task.signing) if task.signing else None
    return Cleaned(
        pack(texts), describe(texts, task.seed, draw_by), signatures, counts, reports, first_bad, b"".join(quarantine)
    )


def _count_left_out(reason: str, counts: Counter[str]) -> None:
    counts[LEFT_OUT] += 1
    counts[f"{LEFT_OUT}_{reason}"] += 1


def _count_bad(record: Record, problem: Problem, policy: Policy, counts: Counter[str]) -> None:
    if problem.kind == "undecodable":  # data.undecodable=skip has been chosen for it
        counts["undecodable"] += 1
        counts["skipped_undecodable"] += 1
        return
    if policy.on_bad_record == "stop":
        raise DataError(
            f"{record.where}: {problem.message}; {problem.remedy}, or set data.on_bad_record=skip or quarantine"
        )
    counts["bad"] += 1
    counts[f"bad_{problem.kind}"] += 1


def _quarantined(record: Record, problem: Problem) -> bytes:
    """Return a bad record as a line of JSON: where it was, the reason, and what was read."""
    payload = record.payload
    text = payload.decode(errors="backslashreplace") if isinstance(payload, bytes) else payload
    line = {"where": record.where, "reason": problem.kind, "message": problem.message, "record": text.rstrip("\r\n")}
    return json.dumps(line).encode() + b"\n"
