"""The points of `--multirun`: each combination of the values given to train or tune is a run. Imports no torch.

Hydra's grammar reads the values. Here they become composed, named and checked runs; `multirun.py` starts them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from megatrain.config import TrainConfig, TuneConfig
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, GROUPS, SEARCH_PATH, choices_of
from megatrain.config.compose import compose, default_run_name, key_types, own_folders
from megatrain.config.values import is_sweep, quoted
from megatrain.errors import ConfigError, MegatrainError, cannot_write
from megatrain.launch import slurm
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord, is_sweep_folder
from megatrain.verbs.tune import dataset_name, name_parts, train_words

MAX_POINTS = 1000
"""Most points of a sweep: a typing mistake in a range must not start a million runs."""

MAX_SUFFIX = 100
"""Longest suffix of a run's name, in characters. A longer one is cut and ends in a hash of the values."""

VALUES = "a,b,c or choice(a,b,c) or range(start,stop,step); for a group also glob(pattern)"

FIXED = {
    "run.name": "it names the sweep, and each of its runs gets a name of its own",
    "run.dir": "the runs of a sweep share one folder",
    "run.sweep": "--multirun sets it",
    "launch": "all runs are started in the same way",
    "launch.name": "all runs are started in the same way",
    "data.folds": "a sweep has one number of folds",
}
"""Keys that cannot be swept, and why."""

FOLD = "data.fold"
"""The key whose values are the folds of a cross-validation."""


@dataclass
class Point:
    """One run of a sweep: the value of each swept key, the overrides that start it, and its checked config."""

    values: dict[str, str]
    overrides: list[str]
    config: TrainConfig

    @property
    def recorded(self) -> SweepPoint:
        """The point's entry in the sweep's record."""
        return SweepPoint(str(self.config.run.name), self.values)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir) / str(self.config.run.name)


# ---------------------------------------------------------------------------------------------------- expanding


def compose_points(overrides: Sequence[str], verb: str = "train", make: bool = False) -> list[Point]:
    """Compose, name and check the points of a sweep of `train` or `tune`. A ConfigError names its point.

    The points are runs of `train` in both cases; with `make`, what those of `tune` begin from is imported and prepared.
    """
    from megatrain.verbs.start_checks import with_checkpoint_model
    from megatrain.verbs.value_checks import check_folder_name, check_values

    fixed, combinations = expand(overrides, verb)
    name = fixed.pop("run.name", None)
    points = []
    for number, values in enumerate(combinations, start=1):
        given = [*fixed.values(), *(f"{key}={value}" for key, value in values.items())]
        with errors_name_point(number, len(combinations), values):
            words = [*given, *([name] if name is not None else [])]
            points.append(Point(values, given, compose(verb, with_checkpoint_model(verb, words))))
    sweep, prefix = sweep_name(points, given=name is not None)
    check_folder_name("run.name", sweep)
    folder = Path(points[0].config.run.dir) / sweep
    recorded = SweepRecord.load(folder).points if is_sweep_folder(folder) else []
    made: set[tuple[str, str]] = set()
    for number, point in enumerate(points, start=1):
        known = next((one.run for one in recorded if one.values == point.values), None)
        run = known or f"{prefix}-{point_suffix(point.values)}"
        words = [quoted("run.name", run), quoted("run.sweep", sweep)]
        with errors_name_point(number, len(points), point.values):
            if isinstance(point.config, TuneConfig):
                point.overrides = _train_words([*point.overrides, *words], point.config, made, make)
                point.config = compose("train", with_checkpoint_model("train", point.overrides))
            else:
                point.overrides += words
                point.config.run.name, point.config.run.sweep = run, sweep
            check_values(point.config)
    refuse_duplicates(points)
    return points


def _train_words(words: Sequence[str], config: TuneConfig, made: set[tuple[str, str]], make: bool) -> list[str]:
    """Return the words of `train` for a point of `tune`; import and prepare what no earlier point has `made`."""
    needs = config.path, dataset_name(config)
    found = train_words(words, make=make and needs not in made, show=not made)
    made.add(needs)
    return found


def last_value(overrides: Sequence[str], key: str) -> str | None:
    """Return the last value of a key in a command line, as text."""
    found = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip().lstrip("+") == key]
    return found[-1].strip() if found else None


def expand(overrides: Sequence[str], verb: str = "train") -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the overrides that all points share, by key, and for each point the values of the swept keys.

    The last swept key varies fastest. Raises ConfigError if nothing is swept, too much is, or a key of `FIXED` is.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    fixed: dict[str, str] = {}
    swept: dict[str, Any] = {}
    for text in overrides:
        name, _, value = text.partition("=")
        if name in (CONFIG_DIR, CONFIG_FILE, SEARCH_PATH):
            fixed[text] = text
            continue
        key = name.strip().lstrip("+").replace("/", ".")
        fixed.pop(key, None)
        swept.pop(key, None)  # the last override of a key wins
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:  # a mistake, or text that only our keys can read: compose tells them apart
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
            raise ConfigError(f"{text}: an interval is continuous; give single values: {VALUES}")
        else:
            parsed.config_loader = _Groups(own_folders(overrides))
            swept[key] = parsed
    if not swept:
        raise ConfigError(
            "--multirun: no key has several values; give some, as in optim.lr=1e-3,3e-4, or leave --multirun out"
        )
    if "run.sweep" in fixed:
        raise ConfigError(f"{fixed['run.sweep']}: {FIXED['run.sweep']}")
    try:
        sizes = {
            key: sum(1 for _ in islice(parsed.sweep_string_iterator(), MAX_POINTS + 1)) for key, parsed in swept.items()
        }
        if empty := [key for key, size in sizes.items() if not size]:
            raise ConfigError(f"{swept[empty[0]].input_line}: this gives no values; a sweep takes {VALUES}")
        if math.prod(sizes.values()) > MAX_POINTS:
            counted = " x ".join(f"{key} {size}" for key, size in sizes.items())
            raise ConfigError(f"--multirun: more than {MAX_POINTS} points ({counted}); split it into several sweeps")
        combinations = list(product(*(list(parsed.sweep_string_iterator()) for parsed in swept.values())))
    except (HydraException, ValueError, ArithmeticError) as error:
        given = " ".join(str(parsed.input_line) for parsed in swept.values())
        raise ConfigError(f"{given}: {error}; a sweep takes {VALUES}") from error
    return fixed, [dict(zip(swept, values, strict=True)) for values in combinations]


class _Groups:
    """Tells Hydra the choices of a config group (for `model=glob(gpt2*)`), those in the user's folders included."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return choices_of(group_name, self._folders) if group_name in GROUPS["train"] else []


@contextmanager
def errors_name_point(number: int, count: int, values: dict[str, str]) -> Iterator[None]:
    """Put the number and values of a point in front of the errors raised inside."""
    try:
        yield
    except MegatrainError as error:
        label = SweepPoint("", values).label
        reason = str(error).removeprefix(f"{label}: ")  # it may begin with the one value that is swept
        raise type(error)(f"point {number} of {count} ({label}): {reason}") from error


# ---------------------------------------------------------------------------------------------------- names


def sweep_name(points: Sequence[Point], given: bool) -> tuple[str, str]:
    """Return the sweep's name, and what the names of its points begin with.

    Both are `run.name` if given. Otherwise they begin with the model and data that all points share, or in `tune` the
    base and method. The sweep's name goes on with the swept keys. So do the names of the points where they would
    otherwise be those of plain runs.
    """
    first = points[0].config
    if isinstance(first, TuneConfig):
        return _name_of_tuning(points)
    if given or first.run.name != default_run_name(first):  # an experiment may give one too
        return str(first.run.name), str(first.run.name)
    common = [
        values.pop()
        for values in ({p.config.model.name for p in points}, {p.config.data.name for p in points})
        if len(values) == 1
    ]
    name = "-".join([*common, *short_names(points[0].values).values()])
    prefix = "-".join(common)
    is_plain = any(f"{prefix}-{point_suffix(point.values)}" == point.config.run.name for point in points)
    return name, name if is_plain or not prefix else prefix


def _name_of_tuning(points: Sequence[Point]) -> tuple[str, str]:
    first = points[0].config
    if first.run.name is not None:
        return first.run.name, first.run.name
    parts = zip(*(name_parts(point.config) for point in points if isinstance(point.config, TuneConfig)), strict=True)
    common = [of_all[0] for of_all in parts if len(set(of_all)) == 1]
    common += [f"{first.data.folds}folds"] * bool(first.data.fold)
    swept = [short for key, short in short_names(points[0].values).items() if key != FOLD]
    prefix = "-".join(common) or "tune"
    return "-".join([prefix, *swept]), prefix


def point_suffix(values: dict[str, str]) -> str:
    """Return a point's part of its run's name, such as `tiny-lr0.001`. The order of the typed keys does not matter."""
    parts = []
    for key, short in short_names(values).items():
        value = values[key]
        unquoted = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
        text = re.sub(r"[^A-Za-z0-9._+-]+", "_", unquoted).strip("_") or "empty"
        separator = "" if text[0].isdigit() or text[0] in "+-" else "_"
        parts.append(text if key in GROUPS["train"] else f"{short}{separator}{text}")
    suffix = "-".join(parts)
    if len(suffix) <= MAX_SUFFIX:
        return suffix
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return f"{suffix[: MAX_SUFFIX - 9]}-{digest}"


def short_names(values: dict[str, str]) -> dict[str, str]:
    """Return a short name for each swept key (its last part if unique), in the schema's order, groups first."""
    order = [*GROUPS["train"], *key_types(TuneConfig)]  # which has all keys of train in their order
    keys = sorted(values, key=order.index)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


# ---------------------------------------------------------------------------------------------------- checks


def refuse_duplicates(points: Sequence[Point]) -> None:
    """Refuse two points with the same config or the same folder. Raises ConfigError."""
    configs: dict[str, int] = {}
    for number, point in enumerate(points, start=1):
        config = asdict(point.config)
        del config["run"]
        first = configs.setdefault(repr(config), number)
        if first != number:
            raise ConfigError(
                f"points {first} ({points[first - 1].recorded.label}) and {number} ({point.recorded.label}) are "
                f"the same; give each value once"
            )
    SweepRecord().add([point.recorded for point in points])


def check_points(points: Sequence[Point]) -> None:
    """Run the checks of a plain start for each point, then check the sweep's own folder. Raises MegatrainError."""
    from megatrain.verbs.path_checks import check_paths

    if len({point.config.launch.name for point in points}) > 1:
        raise ConfigError(f"launch: {FIXED['launch']}")
    for number, point in enumerate(points, start=1):
        with errors_name_point(number, len(points), point.values):
            if point.config.launch.name == "local":
                slurm.check_plain_start(point.config.launch, None)
            check_paths(point.config, point.overrides)
    folder = sweep_folder(points)
    if any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "checkpoints")):
        raise ConfigError(f"run.name={folder.name}: {folder} is a run's folder; give the sweep another run.name")
    merged_record(points)


def merged_record(points: Sequence[Point]) -> SweepRecord:
    """Return the sweep's record with these points added. Raises ConfigError if two points share a run's name."""
    folder = sweep_folder(points)
    record = SweepRecord.load(folder) if is_sweep_folder(folder) else SweepRecord()
    record.add([point.recorded for point in points])
    return record


def sweep_folder(points: Sequence[Point]) -> Path:
    """Return the folder of the sweep's record and report."""
    return Path(points[0].config.run.dir) / str(points[0].config.run.sweep)


def write_record(points: Sequence[Point]) -> None:
    """Record the points before any starts. Raises ConfigError or EnvironmentFault if the folder cannot be written."""
    folder = sweep_folder(points)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with SweepRecord.alone(folder):
            merged_record(points).save(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
