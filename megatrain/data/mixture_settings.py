"""Read `data.mixture` and `data.phases`, and turn them into a plan. Opens no files, imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, Overflow
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import kind_of
from megatrain.data.mixture import LONGEST_PERIOD, MixturePlan, Phase, PlannedSource, whole_weights
from megatrain.errors import ConfigError

KIND = "mixture"
"""`data.kind` of a run on several prepared datasets."""

MIXED = (KIND, "demo")
"""Kinds that have a mixture; the sources of `demo` are datasets in the folder `<data.dir>/<data.name>`."""

SAVED_MIXTURE = "mixture.json"
"""In a folder of datasets: the weights that they are meant to be mixed with, by name."""

_SOURCE_KEYS = ("weight", "epochs", "max_epochs")
_PHASE_KEYS = ("from_step", "from_tokens", "mixture", "mixture_temperature")
_EXAMPLE = "{web: 0.7, code: 0.3}"
_LATEST = 2**62
"""Latest step or token at which a phase may begin."""
_DIGITS = Context(prec=50, Emin=-1000, Emax=1000)
"""Of a power by `data.mixture_temperature`: decimal arithmetic is the same on every machine."""


@dataclass(frozen=True)
class SourceSetting:
    """One source of a mixture: its dataset (a name in data.dir, or a path) and how much of it is read.

    At most one of `weight` (relative) and `epochs` (relative to the other sources' epochs) is given. `max_epochs` is
    how often the run may read it.
    """

    name: str
    place: str
    weight: Fraction | None = None
    epochs: Fraction | None = None
    max_epochs: Fraction | None = None


@dataclass(frozen=True)
class PhaseSetting:
    """A mixture, the config key that holds it, and where it begins: at a step (from 1), or after so many tokens."""

    key: str
    sources: dict[str, SourceSetting]
    temperature: Fraction | None
    from_step: int | None = None
    from_tokens: int | None = None

    @property
    def place(self) -> str:
        """The entry of the config, for messages."""
        return self.key.removesuffix(".mixture") if "phases" in self.key else self.key


def read_phases(config: DataConfig) -> list[PhaseSetting]:
    """Return the mixture that a run begins with and its later phases; empty if the run has no mixture.

    Raises:
        ConfigError: a key, a value or a combination of them is wrong. The message names the key.
    """
    if config.kind not in MIXED:
        if config.mixture or config.phases or config.mixture_temperature is not None:
            key = next(key for key in ("mixture", "phases", "mixture_temperature") if getattr(config, key))
            raise ConfigError(f"data.{key}: only data=mixture has one, given data={config.kind}; give data=mixture too")
        return []
    if not config.mixture:
        raise ConfigError(
            f"data.mixture is empty: data=mixture needs the prepared datasets to mix; give for example "
            f"'data.mixture={_EXAMPLE}'"
        )
    first = _mixture("data.mixture", config.mixture, config.mixture_temperature, "data.mixture_temperature")
    found = [PhaseSetting("data.mixture", first[0], first[1], from_step=1)]
    for number, entry in enumerate(config.phases):
        found.append(_phase(f"data.phases[{number}]", entry))
    places: dict[str, str] = {}
    for phase in found:
        for source in phase.sources.values():
            if places.setdefault(source.name, source.place) != source.place:
                raise ConfigError(
                    f"{phase.key}: {source.place} and {places[source.name]} are both called {source.name} in the "
                    "records; rename one of the folders"
                )
    for unit in ("from_step", "from_tokens"):
        starts = [(getattr(phase, unit), phase.place) for phase in found[1:] if getattr(phase, unit) is not None]
        for (before, _), (after, place) in pairwise(starts):
            if after <= before:
                raise ConfigError(f"{place}.{unit}={after} is not after the phase before it, {before}; sort the phases")
    return found


def _phase(place: str, entry: Any) -> PhaseSetting:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: expected {{from_step: 1000, mixture: {_EXAMPLE}}}, given {kind_of(entry)}")
    _known(place, entry, _PHASE_KEYS)
    given = [name for name in ("from_step", "from_tokens") if entry.get(name) is not None]
    if len(given) != 1:
        raise ConfigError(f"{place}: give one of from_step and from_tokens, given {' and '.join(given) or 'neither'}")
    start, least = entry[given[0]], 2 if given[0] == "from_step" else 1
    if not isinstance(start, int) or isinstance(start, bool) or not least <= start <= _LATEST:
        raise ConfigError(
            f"{place}.{given[0]}={start}: expected a whole number, at least {least} and at most {_LATEST}"
            + (" (what the run begins with is data.mixture)" if isinstance(start, int) and start < least else "")
        )
    mixture = entry.get("mixture")
    if not isinstance(mixture, dict) or not mixture:
        raise ConfigError(f"{place}.mixture: expected a mapping such as {_EXAMPLE}, given {kind_of(mixture)}")
    key = f"{place}.mixture"
    sources, temperature = _mixture(key, mixture, entry.get("mixture_temperature"), f"{place}.mixture_temperature")
    return PhaseSetting(key, sources, temperature, **{given[0]: start})


def _mixture(
    key: str, mixture: Mapping[str, Any], temperature: Any, temperature_key: str
) -> tuple[dict[str, SourceSetting], Fraction | None]:
    sources: dict[str, SourceSetting] = {}
    for place, value in mixture.items():
        source = _source(f"{key}.{place}", str(place), value)
        if source.name in sources:
            raise ConfigError(
                f"{key}: {source.place} and {sources[source.name].place} are both called {source.name} in the records; "
                "rename one of the folders"
            )
        sources[source.name] = source
    power = None if temperature is None else _number(temperature_key, temperature)
    kinds = {
        kind: [source.place for source in sources.values() if getattr(source, kind) is not None]
        for kind in ("weight", "epochs")
    }
    if power is not None:
        if named := kinds["weight"] + kinds["epochs"]:
            raise ConfigError(
                f"{temperature_key}={temperature} takes the weights from the sizes, but {key}.{named[0]} has one; give "
                f"{named[0]}: null, or leave the temperature out"
            )
        return sources, power
    if kinds["weight"] and kinds["epochs"]:
        raise ConfigError(
            f"{key}: {kinds['weight'][0]} has a weight and {kinds['epochs'][0]} has epochs; give all sources weights, "
            "or all epochs"
        )
    for source in sources.values():
        if source.weight is None and source.epochs is None:
            raise ConfigError(
                f"{key}.{source.place}: has neither a weight nor epochs; give {source.place}: 0.5 or "
                f"{source.place}: {{epochs: 1}}, or data.mixture_temperature for all"
            )
    return sources, None


def _source(key: str, place: str, value: Any) -> SourceSetting:
    name = Path(place).name if "/" in place else place
    if not name or not name.isprintable() or name.startswith("."):
        raise ConfigError(f"{key}: {place!r} is not the name or the path of a prepared dataset")
    if value is None:
        return SourceSetting(name, place)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return SourceSetting(name, place, weight=_number(key, value))
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key}={value}: expected a weight such as 0.7, or a mapping such as {{weight: 0.7, max_epochs: 4}} or "
            f"{{epochs: 2}}, given {kind_of(value)}"
        )
    _known(key, value, _SOURCE_KEYS)
    numbers = {name: _number(f"{key}.{name}", number) for name, number in value.items() if number is not None}
    if "weight" in numbers and "epochs" in numbers:
        raise ConfigError(f"{key}: has a weight and epochs; give one of them (max_epochs limits a weight)")
    return SourceSetting(name, place, **numbers)


def _known(place: str, entry: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in entry:
        if name not in known:
            raise ConfigError(
                f"{place}: unknown key {name}{did_you_mean('', str(name), known)} (keys: {', '.join(known)})"
            )


def _number(key: str, value: Any) -> Fraction:
    """Return a positive number as it is written, exactly: 0.1 is a tenth."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{key}={value}: expected a number, given {kind_of(value)}")
    if not math.isfinite(value) or value <= 0:
        hint = "; leave a source out that should not be read" if value == 0 else ""
        raise ConfigError(f"{key}={value}: must be a finite number above 0{hint}")
    return Fraction(repr(value))


# ---------------------------------------------------------------------------------------------------- the plan


def make_plan(
    phases: list[PhaseSetting],
    sources: Mapping[str, PlannedSource],
    seq_len: int,
    samples_before: Callable[[int], int],
) -> MixturePlan:
    """Return the plan of a run. `samples_before` returns the samples that precede a step (from 1).

    Raises:
        ConfigError: two phases begin at one sample, or a weight is too small.
    """
    planned = place_phases(phases, sources, seq_len, samples_before)
    return MixturePlan({name: sources[name] for name in sorted(sources)}, planned)


def place_phases(
    settings: list[PhaseSetting],
    sources: Mapping[str, PlannedSource],
    seq_len: int,
    samples_before: Callable[[int], int],
) -> list[Phase]:
    """Return phases with their first samples and whole weights. Raises as `make_plan`."""
    planned: list[Phase] = []
    for setting in settings:
        start = first_sample(setting, seq_len, samples_before)
        if planned and start <= planned[-1].start:
            raise ConfigError(
                f"{setting.place} begins at sample {start}, and the phase before it at {planned[-1].start}; sort the "
                "phases by where they begin"
            )
        planned.append(Phase(start, phase_weights(setting, sources)))
    return planned


def first_sample(setting: PhaseSetting, seq_len: int, samples_before: Callable[[int], int]) -> int:
    """Return the sample at which a phase begins."""
    if setting.from_tokens is not None:
        return -(-setting.from_tokens // seq_len)
    assert setting.from_step is not None
    return samples_before(setting.from_step)


def phase_weights(setting: PhaseSetting, sources: Mapping[str, PlannedSource]) -> dict[str, int]:
    """Return a phase's whole weights by source. Raises ConfigError for a weight that is too small."""
    shares: dict[str, Fraction] = {}
    if setting.temperature is not None:
        shares = _shares_of_sizes({name: sources[name].samples for name in setting.sources}, setting.temperature)
    for name, source in setting.sources.items():
        size = sources[name].samples
        if setting.temperature is not None:
            continue
        if source.epochs is not None:
            shares[name] = source.epochs * size
        else:
            assert source.weight is not None
            shares[name] = source.weight
    try:
        if lost := [name for name, share in shares.items() if not share]:
            raise ValueError(", ".join(lost))
        return whole_weights(shares)
    except ValueError as error:
        raise ConfigError(
            f"{setting.key}: the share of {error} is below 1/{LONGEST_PERIOD:,}, which is rounded to nothing; give it "
            "a larger weight, or leave it out"
        ) from error


def _shares_of_sizes(sizes: Mapping[str, int], temperature: Fraction) -> dict[str, Fraction]:
    """Return size^(1/temperature) of each source; where that is too large a number, relative to the largest."""
    exponent = _DIGITS.divide(Decimal(temperature.denominator), Decimal(temperature.numerator))
    try:
        return {name: Fraction(_DIGITS.power(Decimal(size), exponent)) for name, size in sizes.items()}
    except Overflow:
        largest = Decimal(max(sizes.values()))
        ratios = {name: _DIGITS.divide(Decimal(size), largest) for name, size in sizes.items()}
        return {name: Fraction(_DIGITS.power(ratio, exponent)) for name, ratio in ratios.items()}


def check_caps(
    phases: list[PhaseSetting],
    plan: MixturePlan,
    end: int,
    skip_ranges: Collection[tuple[int, int]] = (),
    resumes: bool = False,
) -> None:
    """Refuse a run up to sample `end` that reads a source more often than its `max_epochs`. Raises ConfigError.

    Skipped samples are not read. A plan that was changed on a resume has more phases than the config: the config's are
    the last ones.
    """
    ends = [*(phase.start for phase in plan.phases[1:]), end][-len(phases) :]
    for setting, stop in zip(phases, ends, strict=True):
        counts = plan.seen(min(stop, end), skip_ranges)
        for name, source in setting.sources.items():
            read, size = counts[name], plan.sources[name].samples
            if source.max_epochs is None or read <= source.max_epochs * size:
                continue
            raise ConfigError(
                f"{setting.key}.{source.place}: max_epochs={float(source.max_epochs):g} allows "
                f"{int(source.max_epochs * size):,} samples of {name}, but the run reads {read:,} of them "
                f"({read / size:.2f} epochs) in {min(stop, end):,} samples; lower train.steps, raise max_epochs, "
                + (
                    f"or lower its weight with 'checkpoint.override=[{setting.key.partition('[')[0]}]'"
                    if resumes
                    else "lower its weight, or prepare more of it"
                )
            )
