"""What the stage that needs all documents at once decides: which are kept, which are held out, and what was counted.

It is saved beside the cleaned shards, so that tasks of the later stages, and an interrupted preparation, take it as it
is.
"""

from __future__ import annotations

import json
from collections import Counter
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
    """The selection, the counts and reports of cleaning, near duplicates if they were looked for, the first bad record.

    `cleaned` are the cleaned shards in corpus order. They are those of `selection`, unless its only document was cut in
    two, or repeated passages were cut out: then `passages` reports that.
    """

    selection: Selection
    cleaned: list[CleanedShard]
    counts: Counter[str]
    reports: list[StepReport]
    near: NearDuplicates | None
    first_bad: str | None
    passages: StepReport | None = None

    def save(self, work: Path, key: str) -> None:
        """Save it. `key` stands for all that decides it, but for the contents of the cleaned shards."""
        content = {
            "key": key,
            "shards": [(shard.text_path.parent.name, shard.key) for shard in self.selection.shards],
            "cleaned": [shard.key for shard in self.cleaned],
            "counts": dict(self.counts),
            "reports": [asdict(report) for report in self.reports],
            "near": asdict(self.near) if self.near else None,
            "first_bad": self.first_bad,
            "passages": asdict(self.passages) if self.passages else None,
            "flags": self.selection.path.name,
            "hash": self.selection.hash_flags(),
        }
        write_atomically(selected_folder(work) / _MARKER, json.dumps(content) + "\n")

    @staticmethod
    def load(work: Path, key: str, cleaned: list[CleanedShard] | None = None) -> Selected | None:
        """Return what was saved under `key`, for these cleaned shards if they are given; None if there is no such."""
        folder = selected_folder(work)
        try:
            content: dict[str, Any] = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
            if content["key"] != key or (cleaned and content["cleaned"] != [shard.key for shard in cleaned]):
                return None
            names = [("cleaned", name) for name in content["cleaned"]]
            chosen = [(parent, name) for parent, name in content["shards"]]
            shards = {one: CleanedShard(work / one[0], one[1]) for one in {*chosen, *names}}
            selection = Selection([shards[one] for one in chosen], folder / content["flags"], decided=True)
            if selection.hash_flags() != content["hash"]:
                return None
            return Selected(
                selection,
                [shards[one] for one in names],
                Counter(content["counts"]),
                [StepReport(**report) for report in content["reports"]],
                NearDuplicates(**content["near"]) if content["near"] else None,
                content["first_bad"],
                StepReport(**content["passages"]) if content["passages"] else None,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def selected_folder(work: Path) -> Path:
    """Return the folder of the saved selection, made if missing."""
    folder = work / _FOLDER
    folder.mkdir(exist_ok=True)
    return folder
