"""What a worker does with a chunk of records: decode, normalise, count what is bad. A pure function of the chunk."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.data.corpus.cleaned import describe, pack, pack_lines
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.normalise import normalise
from megatrain.data.corpus.recipe import StepReport, new_reports, run_recipe
from megatrain.data.corpus.record import BadRecordError, LeftOutError, Policy, Problem, Record
from megatrain.data.corpus.signatures import Signing, sign
from megatrain.data.corpus.text_files import about_line, removed_line
from megatrain.errors import DataError

_COUNTS = ("read", "left_out", "empty", "bad", "undecodable", "skipped_undecodable", "oversized")
KIND = "kind_"
"""The start of the names of counts of documents by what they were read as."""
READ, NORMALISE = "read", "normalise"
"""What removes a record, beside the steps of the recipe and the search for duplicates."""
LEFT_OUT = "left_out"
"""The count of records that are no documents, and the start of the names of their counts by reason."""


@dataclass(frozen=True)
class CleanTask:
    """Records to clean, the policy for bad ones, the recipe, the seed of the documents' draws, how to sign them.

    With `lines` there is a line on each document and on each record that is removed.
    """

    records: list[Record]
    policy: Policy
    recipe: tuple[Step, ...]
    seed: int
    signing: Signing | None = None
    lines: bool = False


@dataclass(frozen=True)
class Cleaned:
    """Clean documents as a frame, `describe` of them, their signatures, counts, and what each step did.

    `first_bad` describes the first bad record, and `quarantine` has a line of JSON for each if they are to be kept.
    `about` and `removed` are `pack_lines` of the lines on documents and on what was removed, if they were asked for.
    """

    frame: bytes
    documents: np.ndarray
    signatures: np.ndarray | None
    counts: dict[str, int]
    reports: list[StepReport]
    first_bad: str | None
    quarantine: bytes
    about: bytes = b""
    removed: bytes = b""


def clean_chunk(task: CleanTask) -> Cleaned:
    """Decode, normalise and clean records; empty ones and those that policy or recipe leave out are counted.

    Raises `DataError` for the first bad record if the policy is to stop there.
    """
    texts: list[bytes] = []
    draw_by: list[bytes] = []
    memory: dict[str, Any] = {}
    about: list[bytes] = []
    removed: list[bytes] = []
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    reports = new_reports(task.recipe)
    first_bad, quarantine = None, []

    def leave_out(record: Record, reason: str, own: str | None = None) -> None:
        if task.lines:
            removed.append(removed_line(own or record.id or record.where, record.source, READ, reason))

    for record in task.records:
        if record.oversized:
            counts["oversized"] += 1
            leave_out(record, "oversized")
            continue
        if record.left_out:
            _count_left_out(record.left_out, counts)
            leave_out(record, record.left_out)
            continue
        try:
            decoded = decode(record, task.policy)
        except LeftOutError as error:
            _count_left_out(error.reason, counts)
            leave_out(record, error.reason)
            continue
        except BadRecordError as error:
            problem = error.problem
            counts["read"] += 1
            first_bad = first_bad or f"{record.where}: {problem.message}"
            _count_bad(record, problem, task.policy, counts)
            leave_out(record, problem.kind, error.id)
            if task.policy.on_bad_record == "quarantine":
                quarantine.append(_quarantined(record, problem))
            continue
        counts["read"] += 1
        if decoded.kind:
            counts[f"{KIND}{decoded.kind}"] += 1
        counts["undecodable"] += decoded.undecodable
        document = Document(
            decoded.text,
            decoded.id or record.where,
            markup=record.markup,
            metadata=decoded.metadata,
            source=decoded.source,
        )
        document.kind, document.memory = decoded.kind, memory
        family = len(texts)
        for one in _clean(document, task, reports, counts):
            if one.removal is not None:
                step, why = one.removal
                if step == NORMALISE:
                    counts[why.rule] += 1
                if task.lines:
                    removed.append(removed_line(one.id, one.source, step, why.rule, why.detail))
                continue
            if one.markup:
                counts["markup"] += 1
            if one.augmented:
                counts["augmented"] += 1
            texts.append(one.text.encode())
            draw_by.append(texts[family])
            if task.lines:
                about.append(about_line(one))
    signatures = sign([text.decode() for text in texts], task.signing) if task.signing else None
    return Cleaned(
        pack(texts),
        describe(texts, task.seed, draw_by),
        signatures,
        counts,
        reports,
        first_bad,
        b"".join(quarantine),
        pack_lines(about),
        pack_lines(removed),
    )


def _clean(document: Document, task: CleanTask, reports: list[StepReport], counts: Counter[str]) -> list[Document]:
    """Let the recipe work on a document; return the originals beside it and itself, those without `removal` to keep."""
    if not document.text:
        document.removal = NORMALISE, Removal("empty", "")
    elif task.recipe:
        if not run_recipe(task.recipe, document, reports, task.seed):
            counts["cleaned_away"] += 1
        for one in (*document.originals, document):
            if one.removal is None:
                one.text = normalise(one.text)
                one.removal = None if one.text else (NORMALISE, Removal("emptied", ""))
    return [*document.originals, document]


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
            f"{record.where}: {problem.message}; {problem.remedy}, or set data.on_bad_record=skip or quarantine (which "
            "lists them all)"
        )
    counts["bad"] += 1
    counts[f"bad_{problem.kind}"] += 1


def _quarantined(record: Record, problem: Problem) -> bytes:
    """Return a bad record as a line of JSON: where it was, the reason, and what was read."""
    payload = record.payload
    text = payload.decode(errors="backslashreplace") if isinstance(payload, bytes) else payload
    line = {"where": record.where, "reason": problem.kind, "message": problem.message, "record": text.rstrip("\r\n")}
    return json.dumps(line).encode() + b"\n"
