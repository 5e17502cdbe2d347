"""A sweep's record, `<run.dir>/<sweep>/sweep.json`: which runs are its points, and what differs between them.

The points are ordinary runs beside that folder. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatrain.errors import ConfigError, DataError
from megatrain.resilience.atomic_file import remove_abandoned, write_atomically

FILE = "sweep.json"


@dataclass
class SweepPoint:
    """One run of a sweep: its `run.name`, and its value of each swept key or group, as typed."""

    run: str
    values: dict[str, str]

    @property
    def label(self) -> str:
        """Return the point's values as on the command line."""
        return " ".join(f"{name}={value}" for name, value in self.values.items())


@dataclass
class SweepRecord:
    """A sweep's points. `id` distinguishes sweeps of the same name that are tracked on one server."""

    points: list[SweepPoint] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @staticmethod
    def load(folder: Path) -> SweepRecord:
        """Read a sweep's record. Raises DataError if the file is missing or malformed."""
        path = folder / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return SweepRecord([SweepPoint(**point) for point in raw["points"]], raw["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not the record of a sweep ({type(error).__name__}: {error})") from error

    @staticmethod
    @contextmanager
    def alone(folder: Path) -> Iterator[None]:
        """Lock the sweep's folder against other commands, from reading the record to writing it."""
        with open(folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def save(self, folder: Path) -> None:
        """Write the record atomically."""
        remove_abandoned(folder)
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def add(self, points: list[SweepPoint]) -> None:
        """Add the points of a command to those in the record.

        Raises:
            ConfigError: two different points have the same run name.
        """
        known = {point.run: point for point in self.points}
        for point in points:
            if known.setdefault(point.run, point).values != point.values:
                raise ConfigError(
                    f"the points {known[point.run].label!r} and {point.label!r} would both be the run {point.run}; "
                    f"give one of them a sweep of its own: run.name=..."
                )
        self.points = list(known.values())


def is_sweep_folder(folder: Path) -> bool:
    """Return whether a folder holds a sweep's record."""
    return (folder / FILE).is_file()
