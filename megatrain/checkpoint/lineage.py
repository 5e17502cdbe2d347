"""Where a model came from: the models that it was made from, back to the first, each with its data. Imports no torch.

A checkpoint's manifest holds the whole line of its ancestors, so the line outlives their folders. An exported folder
has it in `lineage.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import peek
from megatrain.checkpoint.manifest import Ancestor, Manifest, decode, manifest_hash
from megatrain.errors import CheckpointError
from megatrain.resilience.atomic_file import write_atomically

LINEAGE = "lineage.json"
"""The file of an exported folder."""

COLUMNS = ("model", "made by", "from", "data", "steps")
"""Columns of `rows`."""


def as_ancestor(folder: Path, manifest: Manifest) -> Ancestor:
    """Return what the descendants of a checkpoint record of it."""
    identity, config = manifest.identity, manifest.identity.config
    data = config.get("data") or {}
    made = getattr(identity, "made_from", None) or {}
    by = str(config.get("method", {}).get("name", "pretrain")) if identity.layout else "import"
    if made:
        by = str(made.get("by") or made.get("to") or "made")
    return Ancestor(
        name=str(config.get("run", {}).get("name") or folder.name),
        by=by,
        folder=str(folder),
        checksum=manifest_hash(manifest.to_json()),
        parents=identity.parents or [parent.checksum for parent in _direct(identity.ancestors)],
        step=manifest.step,
        data=data.get("name"),
        dataset_fingerprint=identity.dataset_fingerprint,
        imported_from=identity.imported_from,
    )


def line_of(folder: Path, manifest: Manifest) -> list[Ancestor]:
    """Return the ancestors of a checkpoint and the checkpoint itself, each after those that it was made from."""
    return [*manifest.identity.ancestors, as_ancestor(folder, manifest)]


def joined(lines: Iterable[list[Ancestor]]) -> list[Ancestor]:
    """Return the ancestors of a model that is made of several, each once."""
    found: dict[str, Ancestor] = {}
    for line in lines:
        for ancestor in line:
            found.setdefault(ancestor.checksum, ancestor)
    return list(found.values())


def find_line(path: Path) -> list[Ancestor]:
    """Return the line of a run, a checkpoint or an exported folder; empty if it says nothing of it.

    Raises CheckpointError for a damaged `lineage.json`.
    """
    if (path / LINEAGE).is_file():
        return line_from((path / LINEAGE).read_text(encoding="utf-8"), str(path / LINEAGE))
    newest = peek(path)
    return line_of(*newest) if newest else []


def line_from(text: str, where: str) -> list[Ancestor]:
    """Return the line that `as_text` wrote. Raises CheckpointError, which names `where` it was read."""
    try:
        line: list[Ancestor] = decode(list[Ancestor], json.loads(text), where)
        return line
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from error


def as_text(line: list[Ancestor]) -> str:
    """Return a line as JSON."""
    return json.dumps([asdict(one) for one in line], indent=1)


def write_line(line: list[Ancestor], folder: Path) -> None:
    """Write the line of an exported model into its folder."""
    write_atomically(folder / LINEAGE, as_text(line) + "\n")


def rows(line: list[Ancestor]) -> list[list[str]]:
    """Return a row for each model of a line, the first one first."""
    names = {one.checksum: one.name for one in line}
    return [
        [
            one.name,
            one.by,
            ", ".join(names.get(parent, parent[:8]) for parent in one.parents) or one.imported_from or "nothing",
            _data(one),
            f"{one.step:,}",
        ]
        for one in line
    ]


def _direct(line: list[Ancestor]) -> list[Ancestor]:
    """Return the ancestors in a line that no other one in it was made from."""
    used = {parent for one in line for parent in one.parents}
    return [one for one in line if one.checksum not in used]


def _data(one: Ancestor) -> str:
    return f"{one.data} ({one.dataset_fingerprint[:8]})" if one.data and one.dataset_fingerprint else one.data or ""


def tags(line: list[Ancestor]) -> dict[str, Any]:
    """Return the last model of a line as tags: how it was made, its data, its parents, and the whole line by name."""
    own = line[-1]
    by_checksum = {one.checksum: one for one in line}
    found = [by_checksum[parent] for parent in own.parents if parent in by_checksum]
    return {
        "made_by": own.by,
        "checkpoint": own.folder,
        "checksum": own.checksum,
        "data": own.data,
        "dataset_fingerprint": own.dataset_fingerprint,
        "parents": ", ".join(f"{one.name} step {one.step}" for one in found) or None,
        "lineage": " → ".join(f"{one.name} ({one.by})" for one in line),
    }
