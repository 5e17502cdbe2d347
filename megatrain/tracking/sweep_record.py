"""A sweep's record, `<run.dir>/<sweep>/sweep.json`: which runs are its points, and what differs between them.

The points are ordinary runs beside that folder. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatrain.errors import ConfigError, DataError

FILE = "sweep.json"


@dataclass
class SweepPoint:
    """One run of a sweep: its `run.name`, and the swept keys and groups with its values, as they were typed."""

    run: str
    values: dict[str, str]

    @property
    def label(self) -> str:
        """The point in the words of the command line."""
        return " ".join(f"{name}={value}" for name, value in self.values.items())


@dataclass
class SweepRecord:
    """A sweep's points. `id` tells sweeps of the same name apart where several people track theirs on one server."""

    points: list[SweepPoint] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @staticmethod
    def load(folder: Path) -> SweepRecord:
        """Read a sweep's record. Raises DataError where the file is none."""
        path = folder / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return SweepRecord([SweepPoint(**point) for point in raw["points"]], raw["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not the record of a sweep ({type(error).__name__}: {error})") from error

    @staticmethod
    @contextmanager
    def alone(folder: Path) -> Iterator[None]:
        """Hold the folder's lock against other commands on the same sweep, from reading the record to writing it."""
        with open(folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def save(self, folder: Path) -> None:
        """Write the record; whoever reads it sees all of it."""
        draft = folder / f".{FILE}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / FILE)

    def add(self, points: list[SweepPoint]) -> None:
        """Take in the points of a command; those that are there stay.

        Raises ConfigError where another point has a run's name.
        """
        known = {point.run: point for point in self.points}
        for point in points:
            if known.setdefault(point.run, point).values != point.values:
                raise ConfigError(
                    f"the points {known[point.run].label!r} and {point.label!r} would both be the run {point.run}; give "
                    f"one of them a sweep of its own: run.name=..."
                )
        self.points = list(known.values())


def is_sweep_folder(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / FILE).is_file()
