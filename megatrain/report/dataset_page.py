"""`megatrain report <dataset>`: turn a prepared dataset into one self-contained HTML page. Imports no torch.

This module collects the figures from the card, the examples of the cleaning steps and the files. `page.py` assembles
the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatrain.data.card import SPLITS, Card, check_dataset
from megatrain.data.corpus.cleaning import KIND
from megatrain.data.funnel import Stage, funnel
from megatrain.data.survey import Lengths, Sample, count_in_loss, count_lengths, count_tokens, sample_documents
from megatrain.data.text_stages import EXAMPLES
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.report.page import DATASET_PAGE, write_page
from megatrain.report.sources import describe_packages
from megatrain.report.text_diff import diff
from megatrain.tracking.console import short

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NUM_SAMPLES = 8
"""Random documents on the page."""
NUM_FREQUENT = 24
"""Most frequent tokens on the page."""
SAMPLE_TOKENS = 1000
"""Tokens shown of a random document at most."""
MAX_EXAMPLES = 300
"""Examples of cleaning on the page at most."""
CUT = 2000
"""Characters that an example keeps of a document; a text of that length goes on."""


def report_dataset(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the dataset in `folder` to `out` (default `<folder>/report.html`) and return its path.

    Raises `DataError` if a file is missing or damaged; checksums are not compared.
    """
    return write_page(DATASET_PAGE, collect(folder), out or folder / "report.html")


def collect(folder: Path) -> dict[str, Any]:
    """Return everything that the page shows, ready for JSON."""
    card = check_dataset(folder)
    tokenizer = load_tokenizer(folder / "tokenizer") if card.tokenizer else None
    stages, lengths = funnel(card), count_lengths(folder, card)
    examples, notices = read_examples(folder / EXAMPLES)
    return {
        "name": card.name,
        "fingerprint": card.fingerprint,
        "notices": notices,
        "tiles": tiles(card, stages),
        "has_records": "read" in card.counts,
        "funnel": [asdict(stage) | {"removed": stage.removed} for stage in stages],
        "splits": [
            {"name": name, "documents": split.documents, "bytes": split.bytes, "tokens": split.tokens}
            for name, split in sorted(card.splits.items(), key=lambda item: SPLITS.index(item[0]))
        ],
        "examples": examples,
        "lengths": describe_lengths(lengths),
        "counted": [{"step": name, "counts": by_count(found)} for name, found in counted(card, stages) if found],
        "tokens": describe_tokens(folder, card, tokenizer),
        "samples": [
            describe_sample(sample, tokenizer)
            for sample in sample_documents(folder, card, NUM_SAMPLES, seed_of(card), SAMPLE_TOKENS)
        ],
        "sample_seed": seed_of(card),
        "near_duplicates": near_duplicates(card.near_duplicates),
        "packages": describe_packages({card.name: card}),
        "config": yaml.safe_dump({"source": card.source, "settings": card.config}, allow_unicode=True, sort_keys=False),
    }


def seed_of(card: Card) -> int:
    """Return the seed that the dataset was prepared with, 0 if the card names none."""
    seed = card.config.get("seed")
    return seed if isinstance(seed, int) else 0


def tiles(card: Card, stages: list[Stage]) -> list[dict[str, str]]:
    """Return the numbers at the top: name, value, note."""
    splits = card.splits.values()
    documents, tokens = sum(s.documents for s in splits), sum(s.tokens for s in splits)
    known = [split.bytes for split in splits if split.bytes is not None]
    size = sum(known) if len(known) == len(card.splits) else None
    found = [(name, short(n), f"{n:,}" * (n >= 1000)) for name, n in (("documents", documents), ("tokens", tokens))]
    if size is not None:
        found.append(("text", byte_size(size), f"{size:,} bytes" * (size >= 1000)))
        found.append(("bytes per token", f"{size / max(tokens, 1):.2f}", "of text"))
    if stages:
        read = stages[0].documents_in
        kept = read + sum(stage.added - stage.removed for stage in stages)
        found.append(("kept", f"{kept / max(read, 1):.1%}", f"of {read:,} records"))
    if "heldout" in card.splits:
        held = card.splits["heldout"]
        found.append(("held out", short(held.documents), f"documents, {short(held.tokens)} tokens"))
    return [dict(zip(("name", "value", "note"), tile, strict=True)) for tile in found]


def byte_size(num_bytes: int) -> str:
    """Return a number of bytes with three digits and its unit, as `size` of sources.js does: `6.02 kB`."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes} B"


# ---------------------------------------------------------------------------------------------------- examples


def read_examples(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the steps removed and changed, in groups of a step and a rule, and what could not be read.

    Groups of removed documents have a `rule`; those of changed documents have none.
    """
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    damaged = shown = 0
    if not path.is_file():
        return [], []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                example = json.loads(line)
                key = (str(example["step"]), example.get("rule"))
                pieces = describe_example(example)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += 1
                continue
            shown += 1
            if shown <= MAX_EXAMPLES:
                groups.setdefault(key, []).append(pieces)
    notices = [f"{path.name}: {damaged:,} lines cannot be read; prepare the dataset again for them."] * (damaged > 0)
    if shown > MAX_EXAMPLES:
        notices.append(f"The page shows {MAX_EXAMPLES} of {shown:,} examples; the others are in {path.name}.")
    return [{"step": step, "rule": rule, "examples": found} for (step, rule), found in groups.items()], notices


def describe_example(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example as the page shows it: its title, and the text in pieces (see `diff`)."""
    if "members" in example:  # a cluster of near duplicates: its first document against its second
        first, second = (member["text"] for member in example["members"][:2])
        title = f"{example['documents']:,} documents, Jaccard similarity {example['jaccard']}"
        return {"title": title, "detail": "", "pieces": diff(first, second, is_cut(first, second)), "is_cut": False}
    before, after = example.get("before"), example.get("after")
    title, detail = str(example["id"]), str(example.get("detail") or "")
    if before is None:  # of a step that hides it
        before, after = example["after"], None
    if after is None:
        return {"title": title, "detail": detail, "pieces": [["=", before]], "is_cut": is_cut(before)}
    pieces = diff(before, after, is_cut(before, after))
    if all(kind == "=" for kind, _ in pieces):
        detail = f"changed after the first {CUT:,} characters"
    return {"title": title, "detail": detail, "pieces": pieces, "is_cut": is_cut(before, after)}


def is_cut(*texts: str) -> bool:
    """Return whether a text is probably only the beginning of a document's."""
    return any(len(text) >= CUT for text in texts)


# ---------------------------------------------------------------------------------------------------- figures


def describe_lengths(lengths: Lengths) -> dict[str, Any] | None:
    """Return the histogram of document lengths and its quantiles, None if there are no documents."""
    if not lengths.documents:
        return None
    middle = [[f"{100 * share:g}%", lengths.quantile(share)] for share in QUANTILES]
    return {
        "bins": lengths.bins(),
        "quantiles": [["shortest", lengths.shortest], *middle, ["longest", lengths.longest]],
        "mean": lengths.tokens / lengths.documents,
    }


def counted(card: Card, stages: list[Stage]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what the readers and each step counted: records by kind, languages, masked addresses and so on."""
    kinds = {name.removeprefix(KIND): count for name, count in card.counts.items() if name.startswith(KIND)}
    yield "records by kind", kinds
    yield from ((stage.name, stage.changes) for stage in stages)


def near_duplicates(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows about near duplicates; none if they were not looked for."""
    if not found:
        return []
    sizes = sorted((int(size), count) for size, count in found["sizes"].items())
    rows = [
        ["dropped", f"{found['documents']:,} documents"],
        ["clusters", f"{found['clusters']:,}, the largest of {found['largest']:,} documents"],
        ["clusters by size", " · ".join(f"{size:,} to {2 * size - 1:,}: {count:,}" for size, count in sizes)],
        ["comparisons", f"{found['compared']:,}, of which {found['rejected']:,} are below the threshold"],
        ["checked by text", f"{found['checked']:,} pairs, of which {found['below']:,} are below the threshold"],
    ]
    if found["mean_jaccard"] is not None:
        rows.append(["mean similarity", f"{found['mean_jaccard']:.3f} (Jaccard, of the checked pairs)"])
    return [row for row in rows if row[1]]


def by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Return names and counts, the largest first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def describe_tokens(folder: Path, card: Card, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the facts about tokens and the most frequent ones."""
    found = count_tokens(folder, card)
    used, counted = int(np.count_nonzero(found.counts)), max(found.counted, 1)
    rows = []
    if card.tokenizer:
        size, end = card.tokenizer.vocab_size, card.tokenizer.end_of_document
        rows.append(["tokenizer", f"{card.tokenizer.kind}, {card.tokenizer.fingerprint}"])
        rows.append(["vocabulary used", f"{used:,} of {size:,} ids ({used / size:.1%})"])
        rows.append(["once only", f"{int((found.counts == 1).sum()):,} ids"])
        rows.append(["end tokens", f"{found.counts[end]:,} ({found.counts[end] / counted:.2%} of tokens)"])
    else:
        rows.append(["tokenizer", "unknown"])
        rows.append(["different ids", f"{used:,}"])
    for name in SPLITS:
        split = card.splits.get(name)
        if split and split.bytes is not None and split.tokens:
            rows.append(
                [f"bytes per token, {'held out' if name == 'heldout' else name}", f"{split.bytes / split.tokens:.3f}"]
            )
    in_loss = count_in_loss(folder, card)
    for name, count in ((name, in_loss[name]) for name in SPLITS if name in in_loss):
        share = count / max(card.splits[name].tokens, 1)
        rows.append([f"count in the loss, {'held out' if name == 'heldout' else name}", f"{count:,} ({share:.1%})"])
    if found.beyond:
        rows.append(["ids outside the vocabulary", f"{found.beyond:,}"])
    if found.counted < found.tokens:
        rows.append(["counted", f"{found.counted:,} of {found.tokens:,} tokens, in evenly spaced pieces"])
    names = control_names(tokenizer) if tokenizer else {}
    order = np.argsort(-found.counts, kind="stable")[:NUM_FREQUENT]
    frequent = [
        {
            "id": at,
            "count": int(found.counts[at]),
            "share": float(found.counts[at] / counted),
            **spelled(at, tokenizer, names),
        }
        for at in order.tolist()
        if found.counts[at]
    ]
    return {"rows": rows, "frequent": frequent, "counted": counted}


def control_names(tokenizer: Tokenizer) -> dict[int | None, str]:
    """Return the names of a tokenizer's control tokens by their ids."""
    return {tokenizer.control_token(name): name for name in tokenizer.control_names()}


def spelled(token: int, tokenizer: Tokenizer | None, names: dict[int | None, str]) -> dict[str, str]:
    """Return a token's `text`, or what it is (`kind`) if it has none to show: its name in `names`, for one."""
    if tokenizer is None:
        return {"text": "", "kind": "unknown"}
    if token == tokenizer.end_of_document:
        return {"text": "", "kind": "end of document"}
    if token == tokenizer.beginning_of_document:
        return {"text": "", "kind": "beginning of document"}
    if token in names:
        return {"text": "", "kind": names[token]}
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return {"text": "", "kind": "part of a character" if text else "no text"}
    return {"text": text, "kind": ""}


def decoded(ids: list[int], length: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the text of a document's first ids, None without a tokenizer or with ids that are not in it."""
    if tokenizer is None or any(token >= tokenizer.vocab_size or token < 0 for token in ids):
        return {"text": None, "is_cut": length > 40}
    cut = length > len(ids)
    text = tokenizer.decode(ids)
    return {"text": text.rstrip("\ufffd") if cut else text, "is_cut": cut}  # a cut may divide a character


@dataclass
class Piece:
    """A stretch of a document: its text, whether it counts in the loss, whether it is a control token's name."""

    text: str
    counts: bool = False
    is_control: bool = False


def describe_sample(sample: Sample, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return a random document as a page shows it: `decoded`, and in `pieces` if it is a conversation."""
    shown, pieces = decoded(sample.ids, sample.length, tokenizer), pieces_of(sample, tokenizer)
    return {
        "split": sample.split,
        "number": sample.number,
        "length": sample.length,
        "ids": sample.ids[:40],
        "pieces": pieces and [asdict(piece) for piece in pieces],
        **shown,
    }


def pieces_of(sample: Sample, tokenizer: Tokenizer | None) -> list[Piece] | None:
    """Return a conversation in pieces: control tokens by name, and text, cut where counting in the loss begins or ends.

    None for other documents, and if the ids cannot be decoded.
    """
    ids, counts = sample.ids, sample.counts
    if tokenizer is None or counts is None or decoded(ids, sample.length, tokenizer)["text"] is None:
        return None
    names = control_names(tokenizer)
    decoder, found = tokenizer.stream_decoder(), [Piece("")]
    for token, does_count in zip(ids, counts, strict=True):
        if token in names:
            found.append(Piece(names[token], does_count, True))
            continue
        text = decoder.push(token)
        if found[-1].is_control or found[-1].counts != does_count:
            found.append(Piece("", does_count))
        found[-1].text += text
    return [piece for piece in found if piece.text]


def sample_texts(folder: Path, card: Card, count: int, seed: int, max_tokens: int) -> Iterator[tuple[str, list[Piece]]]:
    """Yield a headline and the beginning of the text (or its ids, if it cannot be decoded) of random documents.

    The text is one piece that does not count, unless it is of a conversation.
    """
    tokenizer = load_tokenizer(folder / "tokenizer") if card.tokenizer else None
    for sample in sample_documents(folder, card, count, seed, max_tokens):
        shown = decoded(sample.ids, sample.length, tokenizer)
        headline = f"{sample.split} document {sample.number:,}, {sample.length:,} tokens"
        text = " ".join(map(str, sample.ids)) if shown["text"] is None else shown["text"]
        pieces = pieces_of(sample, tokenizer) or [Piece(text)]
        yield headline, [*pieces, *([Piece(" …")] if sample.length > len(sample.ids) else [])]
