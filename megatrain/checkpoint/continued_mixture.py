"""The mixture of a resumed run: what it has read stays as it was, what lies ahead may be changed on purpose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from megatrain.checkpoint.manifest import Manifest, Progress
from megatrain.config import DataConfig, TrainLoopConfig
from megatrain.data.mixed_dataset import Mixture
from megatrain.data.mixture import MixturePlan, Phase
from megatrain.data.mixture_settings import (
    PhaseSetting,
    check_caps,
    first_sample,
    phase_weights,
    place_phases,
    read_phases,
)
from megatrain.data.order import cursor_after
from megatrain.errors import CheckpointError, DataError
from megatrain.optim.schedule import samples_before

MIXTURE_KEYS = ("data.mixture", "data.mixture_temperature", "data.phases")
PLAN_KEYS = (
    *MIXTURE_KEYS,
    "train.global_batch_size",
    "train.batch_ramp_start",
    "train.batch_ramp_increment",
    "train.batch_ramp_steps",
)
"""Keys that decide where phases begin, or what they are mixed of."""

CAP_KEYS = {*PLAN_KEYS, "train.steps", "train.skip_ranges"}
"""Keys that decide how often a source is read."""


def continue_mixture(
    saved: Manifest, mixture: Mixture, loop: TrainLoopConfig, changed: Mapping[str, tuple[Any, Any]], origin: str
) -> Mixture:
    """Return the mixture with the plan to go on with: the checkpoint's, or its past and what the config says next.

    `changed` are the keys that differ, as `{key: (old, new)}`. A changed `data.mixture` holds from the checkpoint's
    sample on; the steps of later phases are counted from there.

    Raises:
        CheckpointError: the run had no mixture, or a changed key speaks of samples that it has passed.
        DataError: a source is not the dataset that it was.
    """
    old = saved.identity.mixture
    if old is None:
        raise CheckpointError(
            f"data.mixture: {origin} was trained on one dataset, so its past is no mixture; start a new run from its "
            f"weights: run.name=<new name> checkpoint.init_from={origin}"
        )
    for name, source in old.sources.items():
        if name in mixture.plan.sources and mixture.plan.sources[name] != source:
            raise DataError(
                f"the dataset {name} changed since {origin} was written: its fingerprint was {source.fingerprint} and "
                f"is now {mixture.plan.sources[name].fingerprint}; restore {mixture.folders[name]}"
            )
    if not (set(PLAN_KEYS) & set(changed)) - harmless_keys(saved, changed):
        return mixture.continued(old)
    before = read_phases(_data_config(saved.identity.config.get("data", {})))
    return mixture.continued(_plan_ahead(saved, old, before, mixture, loop))


def harmless_keys(saved: Manifest, changed: Mapping[str, tuple[Any, Any]]) -> set[str]:
    """Return the changed keys of the mixture if all of them together leave the order of the samples as it was.

    Folders and caps (`max_epochs`) may differ: fingerprints identify the datasets.
    """
    keys = set(MIXTURE_KEYS) & set(changed)
    if not keys:
        return keys
    before = saved.identity.config.get("data", {})
    now = before | {key.removeprefix("data."): new for key, (_, new) in changed.items() if key.startswith("data.")}
    same = _orders(read_phases(_data_config(before))) == _orders(read_phases(_data_config(now)))
    return keys if same else set()


def weighs_others(saved: Manifest, mixture: Mixture, heldout: Collection[str]) -> bool:
    """Whether the held-out loss of a continued run is the mean of other sources than before.

    `heldout` are the config's sources with held-out data. A source that it no longer names counts as one that had some.
    """
    old = saved.identity.mixture
    assert old is not None, "continue_mixture refuses a run without one"
    phases = read_phases(_data_config(saved.identity.config.get("data", {})))
    names = {name for phase in phases for name in phase.sources}
    had = {name for name in names if name in heldout or name not in mixture.cards}
    return old.first_weights(had) != mixture.plan.first_weights(heldout)


def check_run_caps(
    mixture: Mixture, loop: TrainLoopConfig, progress: Progress, changed: Collection[str] | None
) -> None:
    """Refuse a run that would read a source more often than its `max_epochs`. Raises ConfigError.

    `changed` are the keys that a resume changes; None for a new run. A restart that changes nothing is not refused:
    skips, which move the samples of a run, must not end it.
    """
    if changed is not None and not CAP_KEYS & set(changed):
        return
    ahead = samples_before(loop, loop.steps + 1) - samples_before(loop, progress.step + 1)
    end = cursor_after(progress.cursor, ahead, progress.skip_ranges)
    check_caps(mixture.phases, mixture.plan, end, progress.skip_ranges, resumes=changed is not None)


def _plan_ahead(
    saved: Manifest, old: MixturePlan, before: list[PhaseSetting], mixture: Mixture, loop: TrainLoopConfig
) -> MixturePlan:
    cursor, step = saved.progress.cursor, saved.step

    def would_have_begun(setting: PhaseSetting) -> bool:
        if setting.from_step is not None:
            return setting.from_step <= step
        return first_sample(setting, loop.seq_len, lambda _: 0) < cursor

    # The config's later phases are the plan's last ones. After a skip they begin before the steps that they name.
    later = old.phases[len(old.phases) - len(before) + 1 :]
    begun = [setting for setting, phase in zip(before[1:], later, strict=True) if phase.start < cursor]
    kept, new = mixture.phases[1 : 1 + len(begun)], mixture.phases[1 + len(begun) :]
    if _orders(begun) != _orders(kept) or any(map(would_have_begun, new)):
        raise CheckpointError(
            f"data.phases: the run is at step {step} (sample {cursor}), so the phases that have begun must stay as "
            f"they were ({', '.join(phase.place for phase in begun) or 'none had begun'}); change only those that "
            f"begin at step {step + 1} or later"
        )
    past = [phase for phase in old.phases if phase.start < cursor]
    sources = {**old.sources, **mixture.plan.sources}
    if _orders(before[:1]) != _orders(mixture.phases[:1]):
        if begun:
            raise CheckpointError(
                f"data.mixture: the run is at step {step}, where {begun[-1].place} has replaced it; restore "
                f"data.mixture, and change the future with a phase from_step: {step + 1} or later"
            )
        past.append(Phase(cursor, phase_weights(mixture.phases[0], sources)))
    elif not past:
        past = [old.phases[0]]
    ahead = place_phases(
        new,
        sources,
        loop.seq_len,
        lambda first: cursor + samples_before(loop, first) - samples_before(loop, step + 1),
    )
    if past[-1].start >= (ahead[0].start if ahead else cursor + 1):
        past.pop()  # nothing was read of it: the next phase begins at the same sample
    return MixturePlan({name: sources[name] for name in sorted(sources)}, [*past, *ahead])


def _orders(phases: list[PhaseSetting]) -> list[Any]:
    """Return what decides the order of samples in each phase."""
    return [
        (
            phase.from_step,
            phase.from_tokens,
            phase.temperature,
            {name: (source.weight, source.epochs) for name, source in phase.sources.items()},
        )
        for phase in phases
    ]


def _data_config(saved: dict[str, Any]) -> DataConfig:
    known = {f.name for f in fields(DataConfig)}
    return DataConfig(**{name: value for name, value in saved.items() if name in known})
