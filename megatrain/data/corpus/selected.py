"""What the stage that needs all documents at once decides: which are kept, which are held out, and what was counted.

It is saved beside the cleaned shards, so that tasks of the later stages, and an interrupted preparation, take it as it
is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatrain.data.corpus.cleaned import CleanedShard
from megatrain.data.corpus.near_duplicates import NearDuplicates
from megatrain.data.corpus.recipe import StepReport
from megatrain.data.corpus.selection import Selection
from megatrain.resilience.atomic_file import write_atomically

_FOLDER, _MARKER = "selected", "selected.json"


@dataclass
class Selected:
    """The selection to encode, the counts and reports of cleaning, what was found of duplicates, the first bad record.

    `documents` is the selection among the cleaned shards, and `whole` that without repeated passages: the same one,
    unless some were cut out; then `passages` reports that. `selection` is `whole`, unless its only document was cut in
    two.
    """

    documents: Selection
    whole: Selection
    selection: Selection
    counts: Counter[str]
    reports: list[StepReport]
    near: NearDuplicates | None
    first_bad: str | None
    passages: StepReport | None = None

    def shards(self) -> list[Sequence[CleanedShard]]:
        """Return the shards of each of the selections, those of equal ones once."""
        return [one.shards for one in {id(one): one for one in (self.documents, self.whole, self.selection)}.values()]

    def save(self, work: Path, key: str) -> None:
        """Save it. `key` stands for all that decides it, but for the contents of the cleaned shards."""
        content = {
            "key": key,
            "documents": _saved(self.documents),
            "whole": _saved(self.whole),
            "selection": _saved(self.selection),
            "counts": dict(self.counts),
            "reports": [asdict(report) for report in self.reports],
            "near": asdict(self.near) if self.near else None,
            "first_bad": self.first_bad,
            "passages": asdict(self.passages) if self.passages else None,
        }
        write_atomically(selected_folder(work) / _MARKER, json.dumps(content) + "\n")

    @staticmethod
    def load(work: Path, key: str, cleaned: list[CleanedShard] | None = None) -> Selected | None:
        """Return what was saved under `key`, for these cleaned shards if they are given; None if there is no such."""
        folder = selected_folder(work)
        try:
            content: dict[str, Any] = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
            if content["key"] != key:
                return None
            documents = _load(work, content["documents"])
            if cleaned and [shard.key for shard in documents.shards] != [shard.key for shard in cleaned]:
                return None
            whole = documents if content["whole"] == content["documents"] else _load(work, content["whole"])
            if whole is not documents and not all(shard.is_whole() for shard in whole.shards):
                return None  # as after a power cut; the cleaned shards are checked where they are found
            same = content["selection"] == content["whole"]
            return Selected(
                documents,
                whole,
                whole if same else _load(work, content["selection"]),
                Counter(content["counts"]),
                [StepReport(**report) for report in content["reports"]],
                NearDuplicates(**content["near"]) if content["near"] else None,
                content["first_bad"],
                StepReport(**content["passages"]) if content["passages"] else None,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _saved(selection: Selection) -> dict[str, Any]:
    shards = [[shard.text_path.parent.name, shard.key] for shard in selection.shards]
    return {"shards": shards, "flags": selection.path.name, "hash": selection.hash_flags()}


def _load(work: Path, saved: dict[str, Any]) -> Selection:
    """Open a saved selection. Raises `ValueError` if its flags are not what was saved."""
    shards = [CleanedShard(work / parent, key) for parent, key in saved["shards"]]
    selection = Selection(shards, selected_folder(work) / saved["flags"], decided=True)
    if selection.hash_flags() != saved["hash"]:
        raise ValueError("the flags are not what was saved")
    return selection


def selected_folder(work: Path) -> Path:
    """Return the folder of the saved selection, made if missing."""
    folder = work / _FOLDER
    folder.mkdir(exist_ok=True)
    return folder
