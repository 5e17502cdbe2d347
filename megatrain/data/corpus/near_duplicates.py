"""Find near duplicates by their signatures, cluster them, and keep the first of each cluster.

Locality-sensitive hashing: a signature is cut into bands, and documents with an equal band are compared. What is found
depends on the documents and their order alone, not on how the work was divided. Memory is bounded but for 8 bytes a
document; the bands' hashes wait on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.clean_config import MinhashConfig
from megatrain.data.corpus.cleaned import unpack
from megatrain.data.corpus.selection import DROPPED, NEAR_DUPLICATE, Selection
from megatrain.data.corpus.signatures import Signing, jaccard
from megatrain.data.corpus.words import mix
from megatrain.errors import DataError

CLUSTERS_SHOWN = 20
"""The largest clusters, of which the report has two members each."""
PAIRS_CHECKED = 100
"""Pairs of duplicates whose true similarity is computed from their texts."""
_EXCERPT = 200  # characters of a member
_BYTES_A_ROW = 64  # of memory, while rows of a band are sorted
_BLOCK = 2**14  # documents or pairs that are worked on at a time


@dataclass
class NearDuplicates:
    """What was found: documents dropped, clusters by size, pairs compared, and how right the estimate was.

    `sizes` counts clusters by their size, in powers of two: `4` counts those of 4 to 7 documents. `compared` is how
    often signatures were compared, once for each band that two documents share; `rejected` of these pairs were below
    the threshold, the false positives of the bands. Of the others, `checked` pairs were compared by their texts, and
    `below` of them were truly less alike than the threshold.
    """

    documents: int = 0
    clusters: int = 0
    largest: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    rejected: int = 0
    checked: int = 0
    below: int = 0
    mean_jaccard: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)

    def without_examples(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "examples"}


def drop_near_duplicates(
    selection: Selection, config: MinhashConfig, signing: Signing, memory_bytes: int, folder: Path
) -> NearDuplicates:
    """Drop all but the first document of each cluster of near duplicates among those not dropped yet.

    `folder` is for files that are removed at the end. Raises `DataError` if a shard's signatures were made otherwise.
    """
    for shard in selection.shards:
        if shard.signing != signing.settings():
            raise DataError(
                f"{shard.signatures_path}: signatures made with {shard.signing}, not with {signing.settings()}; "
                "remove the folder and prepare again"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _write_bands(selection, config, folder)
    clusters = _Clusters(selection.num_documents)
    report = NearDuplicates()
    sample = np.zeros((0, 3), np.uint64)  # draw and the two documents
    for band in range(config.bands):
        for pairs in _candidates(selection, folder / str(band), memory_bytes):
            one, other = (_signatures(selection, pairs[:, side]) for side in (0, 1))
            alike = (one == other).sum(axis=1) >= np.float64(config.threshold) * signing.hashes - 1e-9
            clusters.join(pairs[alike])
            report.compared += len(pairs)
            report.rejected += int((~alike).sum())
            sample = _sample(sample, pairs[alike])
    shutil.rmtree(folder)
    members, heads = clusters.members()
    selection.flags[members] = NEAR_DUPLICATE
    _count(report, heads)
    _check(report, selection, sample[:, 1:].astype(np.int64), config)
    report.examples = _examples(selection, members, heads, config)
    return report


def _write_bands(selection: Selection, config: MinhashConfig, folder: Path) -> None:
    """Write a file for each band: a hash of 64 bits for each document, in corpus order; 0 for one without words."""
    for band in range(config.bands):
        (folder / str(band)).touch()
    for shard in selection.shards:
        for start in range(0, shard.num_documents, _BLOCK):
            signatures = shard.signatures()[start : start + _BLOCK].astype(np.uint64)
            wordless = ~signatures.any(axis=1)
            for band in range(config.bands):
                hashes = np.full(len(signatures), band + 1, np.uint64)
                for column in range(band * config.rows, (band + 1) * config.rows):
                    hashes = mix(hashes + signatures[:, column])
                hashes[wordless] = 0
                with open(folder / str(band), "ab") as file:  # not all at once: a process may open few
                    file.write(hashes.tobytes())


def _candidates(selection: Selection, path: Path, memory_bytes: int) -> Iterator[np.ndarray]:
    """Yield pairs of documents with an equal band, `[pairs, 2]`, the first of a pair being before the second.

    Of all documents with that band, each is paired with the first and with the one before it. The rows are sorted by
    hash in as many passes over the file as the memory demands.
    """
    passes = max(1, -(-selection.num_documents * _BYTES_A_ROW // memory_bytes))
    for number in range(passes):
        hashes, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]  # an empty one: there may be no rows
        with open(path, "rb") as file:
            for start in range(0, selection.num_documents, _BLOCK):
                block = np.frombuffer(file.read(8 * _BLOCK), np.uint64)
                chosen = (selection.flags[start : start + _BLOCK] != DROPPED) & (block != 0)
                if passes > 1:
                    chosen &= block % np.uint64(passes) == number
                at = np.flatnonzero(chosen)
                hashes.append(block[at])
                documents.append(start + at)
        values, order = np.concatenate(hashes), np.concatenate(documents)
        del hashes, documents
        by_hash = np.argsort(values, kind="stable")
        values, order = values[by_hash], order[by_hash]
        again = np.flatnonzero(values[1:] == values[:-1]) + 1
        heads = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))  # the first row of each hash
        for start in range(0, len(again), _BLOCK):
            rows = again[start : start + _BLOCK]
            first = heads[np.searchsorted(heads, rows, side="right") - 1]
            before = rows[rows - 1 != first]
            yield np.concatenate(
                [
                    np.stack([order[first], order[rows]], axis=1),
                    np.stack([order[before - 1], order[before]], axis=1),
                ]
            )


def _signatures(selection: Selection, documents: np.ndarray) -> np.ndarray:
    """Return the signatures of documents, in their order. The files are mapped for no longer than that."""
    by_document = np.argsort(documents, kind="stable")
    ordered = documents[by_document]
    ends = np.searchsorted(ordered, [*selection.starts[1:], selection.num_documents])
    parts = []
    before = 0
    for number, end in enumerate(ends):
        if end > before:
            parts.append(selection.shards[number].signatures()[ordered[before:end] - selection.starts[number]])
        before = int(end)
    found = np.concatenate(parts)
    result = np.empty_like(found)
    result[by_document] = found
    return result


class _Clusters:
    """Sets of documents that grow together: for each document one that is before it in its set, or itself."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)

    def _roots(self, documents: np.ndarray) -> np.ndarray:
        roots: np.ndarray = self._parents[documents]
        while not np.array_equal(further := self._parents[roots], roots):
            roots = further
        self._parents[documents] = roots
        return roots

    def join(self, pairs: np.ndarray) -> None:
        """Join the sets of the two documents of each pair."""
        while len(pairs):
            roots = np.stack([self._roots(pairs[:, 0]), self._roots(pairs[:, 1])], axis=1)
            pairs = roots[roots[:, 0] != roots[:, 1]]
            np.minimum.at(self._parents, pairs.max(axis=1), pairs.min(axis=1))

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents that are not the first of their set, ascending, and the first of each one's set."""
        members = np.flatnonzero(self._parents != np.arange(len(self._parents)))
        return members, self._roots(members)


def _count(report: NearDuplicates, heads: np.ndarray) -> None:
    sizes = np.unique(heads, return_counts=True)[1] + 1
    report.documents, report.clusters = len(heads), len(sizes)
    report.largest = int(sizes.max(initial=0))
    powers, counts = np.unique(np.floor(np.log2(sizes)).astype(np.int64), return_counts=True)
    report.sizes = {str(2 ** int(power)): int(count) for power, count in zip(powers, counts, strict=True)}


def _sample(sample: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the pairs of the lowest draws among those sampled and new ones."""
    documents = pairs.astype(np.uint64)
    draws = mix(mix(documents[:, 0]) + documents[:, 1])
    both = np.concatenate([sample, np.stack([draws, documents[:, 0], documents[:, 1]], axis=1)])
    both = np.unique(both, axis=0)
    return both[np.lexsort((both[:, 2], both[:, 1], both[:, 0]))][:PAIRS_CHECKED]


def _check(report: NearDuplicates, selection: Selection, pairs: np.ndarray, config: MinhashConfig) -> None:
    """Compare pairs by their texts."""
    true = [jaccard(_text(selection, one), _text(selection, other), config.ngram) for one, other in pairs.tolist()]
    report.checked = len(true)
    report.below = sum(value < config.threshold for value in true)
    report.mean_jaccard = round(sum(true) / len(true), 4) if true else None


def _text(selection: Selection, document: int) -> str:
    number, index = selection.locate(document)
    frame, at = selection.shards[number].locate(index)
    return unpack(selection.shards[number].text_path, frame)[at].decode()


def _examples(
    selection: Selection, members: np.ndarray, heads: np.ndarray, config: MinhashConfig
) -> list[dict[str, Any]]:
    """Return the first two members of each of the largest clusters."""
    first, sizes = np.unique(heads, return_counts=True)
    largest = np.lexsort((first, -sizes))[:CLUSTERS_SHOWN]
    examples = []
    for head, size in zip(first[largest].tolist(), sizes[largest].tolist(), strict=True):
        pair = (head, int(members[np.argmax(heads == head)]))
        texts = [_text(selection, document) for document in pair]
        examples.append(
            {
                "documents": size + 1,
                "jaccard": round(jaccard(texts[0], texts[1], config.ngram), 4),
                "members": [
                    {"id": document, "text": text[:_EXCERPT]} for document, text in zip(pair, texts, strict=True)
                ],
            }
        )
    return examples
