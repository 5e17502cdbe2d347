"""Encoded shards on disk: token ids and document lengths of each split, and a marker written last.

A shard is `<key>.<split>.ids` and `<key>.<split>.lengths` (int32) for each split that it has documents of, with
`<key>.<split>.counts` (uint8) if they are conversations, and `<key>.json` with sizes and checksums. Joined in corpus
order, shards are the dataset's files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatrain.data.corpus.encoding import EncodedSplit
from megatrain.data.corpus.part_files import PartFiles
from megatrain.data.indexed import hash_file
from megatrain.resilience.atomic_file import write_atomically

_DOCUMENTS = 2**14  # read at once


class EncodedShard:
    """A finished encoded shard, opened by its marker. `text_bytes` has the bytes of UTF-8 of each split."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self.key = folder, key
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        self.text_bytes = {int(split): size for split, size in content["text_bytes"].items()}
        self._hashes: dict[str, str] = content["hashes"]

    @staticmethod
    def find(folder: Path, key: str) -> EncodedShard | None:
        """Return the shard if it is finished and its files are what was written."""
        try:
            shard = EncodedShard(folder, key)
            whole = all(hash_file(folder / name) == digest for name, digest in shard._hashes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return shard if whole else None

    def read(self, split: int, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Yield token ids, the lengths (int32) of the documents they belong to, and which ids count in the loss.

        The last (uint8) is None but for conversations. A few thousand documents come at once.
        """
        if split not in self.text_bytes:
            return
        names = [f"{self.key}.{split}.{ending}" for ending in ("ids", "lengths", "counts")]
        with ExitStack() as stack:
            ids, lengths, *counts = (
                stack.enter_context(open(self._folder / name, "rb")) for name in names if name in self._hashes
            )
            while len(found := np.fromfile(lengths, "<i4", _DOCUMENTS)):
                total = int(found.sum(dtype=np.int64))
                counted = np.fromfile(counts[0], np.uint8, total) if counts else None
                yield np.fromfile(ids, dtype, total), found, counted


class EncodedShardWriter:
    """Writes an encoded shard; it exists once `finish` has been called. A killed writer's files are overwritten."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._files = PartFiles(folder, key)
        self._text_bytes: Counter[int] = Counter()

    def add(self, split: int, documents: EncodedSplit) -> None:
        """Append documents of a split."""
        self._files[f"{split}.ids"].write(documents.ids.tobytes())
        self._files[f"{split}.lengths"].write(documents.lengths.astype("<i4").tobytes())
        if documents.counts is not None:
            self._files[f"{split}.counts"].write(documents.counts.tobytes())
        self._text_bytes[split] += documents.text_bytes

    def finish(self) -> EncodedShard:
        """Write the marker and return the shard."""
        content = {"text_bytes": dict(self._text_bytes), "hashes": self._files.finish()}
        write_atomically(self._folder / f"{self._key}.json", json.dumps(content) + "\n")
        return EncodedShard(self._folder, self._key)

    def close(self) -> None:
        """Close the files."""
        self._files.close()
