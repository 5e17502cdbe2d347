"""What the end of `megatrain prepare` says: counts, what cleaning did, and bad records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatrain.data.card import Card
from megatrain.data.corpus.cleaning import KIND, LEFT_OUT

QUARANTINE = "quarantine.jsonl"
"""The bad records of a dataset, in its folder, if `data.on_bad_record=quarantine` found any."""
_BAD = "bad_"
"""The start of the names of counts of bad records by reason; `bad` counts them all."""
_MOST = 0.5
"""The share of documents below which so few are left that the end of `prepare` says so."""
_MUCH_HELD_OUT = 0.1
"""The share of tokens in the held-out split from which the end of `prepare` says so."""
_MANY_BAD = 0.01
"""The share of bad records above which the end of `prepare` warns."""


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts in words, without zeros: what was read first, the others by name."""
    found = sorted((item for item in counts.items() if item[1]), key=lambda item: (item[0] != "read", item[0]))
    return ", ".join(f"{words(name)} {count:,}" for name, count in found) or "nothing read"


def words(name: str) -> str:
    """Return the name of a rule or of a count as people read it: `too short`."""
    return name.replace("_", " ")


def num_bad(counts: Mapping[str, int]) -> int:
    """Return the number of records that were left out as bad."""
    return counts.get("bad", 0) + counts.get("skipped_undecodable", 0)


def bad_kinds(counts: Mapping[str, int]) -> dict[str, int]:
    """Return how many records were left out as bad, by reason."""
    kinds = {name.removeprefix(_BAD): count for name, count in counts.items() if name.startswith(_BAD)}
    return kinds | {"undecodable": counts.get("skipped_undecodable", 0)}


def summary(target: Path, card: Card) -> Iterator[str]:
    """Yield the lines that say what was prepared."""
    yield f"{target}: prepared, fingerprint {card.fingerprint}"
    documents = {name: f"{split.documents:,}" for name, split in card.splits.items()}
    tokens = {name: f"{split.tokens:,}" for name, split in card.splits.items()}
    columns = [max(map(len, column)) + 1 for column in (documents, documents.values(), tokens.values())]
    for name, split in card.splits.items():
        label, count, ids = (
            f"{name}:".ljust(columns[0]),
            documents[name].rjust(columns[1]),
            tokens[name].rjust(columns[2]),
        )
        size = f"  {label}{count} document{'s' * (split.documents != 1)},{ids} tokens"
        if split.bytes is not None:  # unknown for data that came as token ids
            size += f", {_size(split.bytes)} of text ({split.bytes / max(split.tokens, 1):.2f} bytes per token)"
        yield size
    kinds = {name.removeprefix(KIND): count for name, count in card.counts.items() if name.startswith(KIND)}
    if kinds:
        yield f"  read as: {format_counts(kinds)}"
    if left_out := card.counts.get(LEFT_OUT):
        reasons = {
            n.removeprefix(f"{LEFT_OUT}_"): count for n, count in card.counts.items() if n.startswith(f"{LEFT_OUT}_")
        }
        yield f"  no documents, left out: {left_out:,} ({format_counts(reasons)})"
    counts = {name: count for name, count in card.counts.items() if not name.startswith((_BAD, KIND, LEFT_OUT))}
    kept = {"with HTML tags": counts.pop("markup", 0)}
    kept["with replaced bytes that are not UTF-8"] = counts.pop("undecodable", 0) - counts.get("skipped_undecodable", 0)
    if card.counts:
        yield f"  documents: {format_counts(counts)}"
    if any(kept.values()):
        yield f"  of these: {format_counts(kept)}"
    yield from map(_step, card.cleaning)
    if near := card.near_duplicates:
        yield (
            f"  near duplicates: {near['documents']:,} dropped, in {near['clusters']:,} clusters of up to "
            f"{near['largest']:,}; {near['compared']:,} comparisons, {near['rejected']:,} rejected; "
            f"{near['below']:,} of {near['checked']:,} pairs checked by their text are below the threshold"
        )
    if card.duplicate_passages:
        yield _step(card.duplicate_passages)
    yield from _surprises(target, card)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _surprises(target: Path, card: Card) -> Iterator[str]:
    """Yield notes on what a user may not have wanted: most documents removed, a large part of the tokens held out."""
    steps = [step for step in card.cleaning if step["documents_in"] > step["documents_out"]]
    if steps and card.cleaning[-1]["documents_out"] < _MOST * card.cleaning[0]["documents_in"]:
        before, after = card.cleaning[0]["documents_in"], card.cleaning[-1]["documents_out"]
        worst = max(steps, key=lambda step: step["documents_in"] - step["documents_out"])
        yield (
            f"note: cleaning removed {before - after:,} of {before:,} documents, most of them by {worst['name']}; "
            f"megatrain report {target} shows examples"
        )
    tokens = {name: split.tokens for name, split in card.splits.items()}
    share = tokens.get("heldout", 0) / max(sum(tokens.values()), 1)
    if share > _MUCH_HELD_OUT and not card.config.get("data", {}).get("folds"):
        yield (
            f"note: {share:.0%} of the tokens are held out, as data.heldout_fraction counts documents, which differ in "
            "length; each evaluation reads them all unless train.eval_steps bounds it"
        )


def _step(step: dict[str, Any]) -> str:
    """Return the line about a cleaning step, from the fields of its report."""
    added = step.get("added", 0)
    removed = step["documents_in"] + added - step["documents_out"]
    what = [f"{removed:,} removed ({format_counts(step['rules'])})"] if removed else []
    changes = format_counts(step["changes"]) if step["changes"] else ""
    if step["changed"]:
        what.append(f"{step['changed']:,} changed" + f" ({changes})" * bool(changes))
    elif changes:  # what was counted of documents that stay as they are, such as those without a URL
        what.append(changes)
    what += [f"{added:,} originals kept beside them"] if added else []
    return f"  {step['name']}: {step['documents_in']:,} documents, {', '.join(what) or 'nothing to do'}"


def bad_records(target: Path, counts: Mapping[str, int], first: str | None) -> Iterator[str]:
    """Yield the lines that say how many records were left out as bad, by reason, where they are, and the first."""
    bad, read = num_bad(counts), counts.get("read", 0)
    if not bad:
        return
    kinds = bad_kinds(counts)
    kept = target / QUARANTINE
    where = f"kept in {kept}" if kept.is_file() else "not kept; data.on_bad_record=quarantine keeps them"
    yield f"  bad records left out: {bad:,} of {read:,} ({format_counts(kinds)}), {where}"
    yield f"  the first: {first}"
    if bad > _MANY_BAD * read:
        yield (
            f"warning: {100 * bad / read:.3g}% of the records are bad and were left out; mend the data, or refuse so "
            f"many with data.max_bad_fraction={_MANY_BAD:g}"
        )
