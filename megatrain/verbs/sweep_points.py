"""The points of `megatrain train --multirun`: every combination of the values given, each a run of its own. Imports no
torch.

Hydra's grammar reads the values and its basic sweeper combines them; here they become composed, named and checked runs.
How they are started is launch/sweep.py's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatrain.config import TrainConfig
from megatrain.config.compose import GROUPS, choices_of, compose, default_run_name, is_sweep, key_types
from megatrain.errors import ConfigError, MegatrainError, cannot_write
from megatrain.launch import slurm
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord, is_sweep_folder

MAX_POINTS = 1000
"""A typing mistake in a range must not start a million runs."""

MAX_SUFFIX = 100
"""Letters of a run's name that tell its point; a longer one ends in a hash of what it stands for."""

VALUES = "a,b,c or choice(a,b,c) or range(start,stop,step), and of a group also glob(pattern)"

FIXED = {
    "run.name": "it is the name of the sweep, and its points get names of their own",
    "run.dir": "the points of a sweep lie in one folder",
    "run.sweep": "--multirun sets it",
    "launch": "all points are started in the same way",
    "launch.name": "all points are started in the same way",
}
"""Keys that no sweep is over, and why."""


@dataclass
class Point:
    """One point: what is swept with its values, the words that start it, and its checked config."""

    values: dict[str, str]
    words: list[str]
    config: TrainConfig

    @property
    def recorded(self) -> SweepPoint:
        """The point as the sweep's record holds it."""
        return SweepPoint(str(self.config.run.name), self.values)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir) / str(self.config.run.name)


# ---------------------------------------------------------------------------------------------------- expanding


def prepare(overrides: Sequence[str]) -> list[Point]:
    """The points of a sweep, composed and named, their values checked. Raises ConfigError, naming the point."""
    from megatrain.verbs.checks import check_folder_name, check_values

    fixed, combinations = expand(overrides)
    name = fixed.pop("run.name", None)
    points = []
    for number, values in enumerate(combinations, start=1):
        words = [*fixed.values(), *(f"{key}={value}" for key, value in values.items())]
        with of_point(number, len(combinations), values):
            named = [name] if name is not None else []
            points.append(Point(values, words, compose("train", [*words, *named])))
    sweep = sweep_name(points, given=name is not None)
    check_folder_name("run.name", sweep)
    for number, point in enumerate(points, start=1):
        point.config.run.sweep = sweep
        point.config.run.name = f"{sweep}-{suffix(point.values)}"
        point.words += [override("run.name", point.config.run.name), override("run.sweep", sweep)]
        with of_point(number, len(points), point.values):
            check_values(point.config)
    refuse_twins(points)
    return points


def expand(overrides: Sequence[str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The overrides that hold for all points, by key, and for every point the values of what is swept.

    The last key that is swept changes fastest. Raises ConfigError for a sweep of nothing, of too much or of a key of
    `FIXED`.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    fixed: dict[str, str] = {}
    swept: dict[str, Any] = {}
    for text in overrides:
        name, _, value = text.partition("=")
        key = name.strip().lstrip("+").replace("/", ".")
        fixed.pop(key, None)
        swept.pop(key, None)  # later ones win
        try:
            parsed = parser.parse_override(text)
        except (
            HydraException
        ) as error:  # text of a kind that only our keys know, or a mistake: compose tells them apart
            if is_sweep(value) and not value.startswith("["):
                raise ConfigError(
                    f"cannot read {text}: a sweep takes {VALUES}; special characters need quotes"
                ) from error
            fixed[key] = text
            continue
        if not parsed.is_sweep_override():
            fixed[key] = text
        elif key in FIXED:
            raise ConfigError(f"{text}: {key} cannot be swept: {FIXED[key]}")
        elif not parsed.is_discrete_sweep():
            raise ConfigError(f"{text}: an interval has no points; give single values: {VALUES}")
        else:
            parsed.config_loader = _Groups()
            swept[key] = parsed
    if not swept:
        raise ConfigError(
            "--multirun: nothing has several values; give some, as in optim.lr=1e-3,3e-4, or start one run without it"
        )
    if "run.sweep" in fixed:
        raise ConfigError(f"{fixed['run.sweep']}: {FIXED['run.sweep']}")
    try:
        sizes = {key: sum(1 for _ in islice(one.sweep_string_iterator(), MAX_POINTS + 1)) for key, one in swept.items()}
        if empty := [key for key, size in sizes.items() if not size]:
            raise ConfigError(f"{swept[empty[0]].input_line}: these are no values at all")
        if math.prod(sizes.values()) > MAX_POINTS:
            counted = " x ".join(f"{key} {size}" for key, size in sizes.items())
            raise ConfigError(f"--multirun: more than {MAX_POINTS} points ({counted}); make several sweeps of it")
        (combinations,) = BasicSweeper.split_arguments(list(swept.values()), None)
    except (HydraException, ValueError, ArithmeticError) as error:
        given = " ".join(str(one.input_line) for one in swept.values())
        raise ConfigError(f"{given}: {error}; a sweep takes {VALUES}") from error
    values = [[word.partition("=")[2] for word in words] for words in combinations]
    return fixed, [dict(zip(swept, one, strict=True)) for one in values]


class _Groups:
    """What Hydra asks for the choices of a group (`model=glob(gpt2*)`)."""

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return choices_of(group_name) if group_name in GROUPS["train"] else []


@contextmanager
def of_point(number: int, count: int, values: dict[str, str]) -> Iterator[None]:
    """Errors say which point they are about."""
    try:
        yield
    except MegatrainError as error:
        raise type(error)(f"point {number} of {count} ({SweepPoint('', values).label}): {error}") from error


# ---------------------------------------------------------------------------------------------------- names


def sweep_name(points: Sequence[Point], given: bool) -> str:
    """The sweep's name: `run.name` where it is given, else what all points have in common and what is swept."""
    first = points[0].config
    if given or first.run.name != default_run_name(first):  # an experiment gives one, too
        return str(first.run.name)
    common = [
        values.pop()
        for values in ({p.config.model.name for p in points}, {p.config.data.name for p in points})
        if len(values) == 1
    ]
    return "-".join([*common, *short_names(points[0].values).values()])


def suffix(values: dict[str, str]) -> str:
    """A point in a folder's name: `tiny-lr0.001`. The order in which the keys were typed does not matter."""
    words = []
    for key, short in short_names(values).items():
        value = values[key]
        bare = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
        text = re.sub(r"[^A-Za-z0-9._+-]+", "_", bare).strip("_") or "empty"
        joint = "" if text[0].isdigit() or text[0] in "+-" else "_"
        words.append(text if key in GROUPS["train"] else f"{short}{joint}{text}")
    whole = "-".join(words)
    if len(whole) <= MAX_SUFFIX:
        return whole
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return f"{whole[: MAX_SUFFIX - 9]}-{digest}"


def short_names(values: dict[str, str]) -> dict[str, str]:
    """The swept keys in the schema's order, groups first, with the last part of their names where that is enough."""
    order = [*GROUPS["train"], *key_types(TrainConfig)]
    keys = sorted(values, key=order.index)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def override(key: str, value: str) -> str:
    """An override that sets text, quoted where it needs it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    plain = re.fullmatch(r"[\w.+-]+", value)
    return f"{key}={value if plain else QuotedString(value, Quote.single).with_quotes()}"


# ---------------------------------------------------------------------------------------------------- checks


def refuse_twins(points: Sequence[Point]) -> None:
    """No two points train the same model in the same way, nor in the same folder. Raises ConfigError."""
    configs: dict[str, int] = {}
    for number, point in enumerate(points, start=1):
        config = asdict(point.config)
        del config["run"]
        first = configs.setdefault(repr(config), number)
        if first != number:
            raise ConfigError(
                f"the points {first} ({points[first - 1].recorded.label}) and {number} ({point.recorded.label}) are the "
                f"same; give each value once"
            )
    SweepRecord().add([point.recorded for point in points])


def check(points: Sequence[Point]) -> None:
    """What a plain start checks on disk, for every point, and the sweep's own folder. Raises MegatrainError."""
    from megatrain.verbs.checks import check_paths

    if len({point.config.launch.name for point in points}) > 1:
        raise ConfigError(f"launch: {FIXED['launch']}")
    for number, point in enumerate(points, start=1):
        with of_point(number, len(points), point.values):
            if point.config.launch.name == "local":
                slurm.check_plain_start(point.config.launch, None)
            check_paths(point.config)
    folder = sweep_folder(points)
    if any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "checkpoints")):
        raise ConfigError(f"run.name={folder.name}: {folder} is a run's folder; give the sweep a name of its own")
    joined(points)


def joined(points: Sequence[Point]) -> SweepRecord:
    """The sweep's record with these points in it. Raises ConfigError where a run's name is another point's already."""
    folder = sweep_folder(points)
    record = SweepRecord.load(folder) if is_sweep_folder(folder) else SweepRecord()
    record.add([point.recorded for point in points])
    return record


def sweep_folder(points: Sequence[Point]) -> Path:
    """Where the sweep's record and report are."""
    return Path(points[0].config.run.dir) / str(points[0].config.run.sweep)


def write_record(points: Sequence[Point]) -> None:
    """Note the points before any is started. Raises ConfigError or EnvironmentFault where the folder cannot be written."""
    folder = sweep_folder(points)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with SweepRecord.alone(folder):
            joined(points).save(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
