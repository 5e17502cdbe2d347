"""What a resume may change of a mixture: the future, on purpose; never what the run has read."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.continued_mixture import check_run_caps, continue_mixture, weighs_others
from megatrain.checkpoint.manifest import Identity, Manifest, Progress
from megatrain.checkpoint.resume import changed_keys, check_resume, take_over
from megatrain.config import TrainConfig
from megatrain.data.mixed_dataset import Mixture
from megatrain.data.mixture import Phase, PlannedSource
from megatrain.data.mixture_settings import make_plan, read_phases
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.optim.schedule import samples_before

SIZES = {name: PlannedSource(f"{name} fingerprint", size) for name, size in (("code", 100), ("web", 900), ("zh", 25))}


def run(mixture, phases=(), *, batch=8, override=(), sizes=SIZES):
    config = TrainConfig()
    config.data.name, config.data.kind, config.data.mixture = "m", "mixture", mixture
    config.data.phases, config.train.global_batch_size = list(phases), batch
    config.checkpoint.override = list(override)
    settings = read_phases(config.data)
    names = sorted({name for phase in settings for name in phase.sources})
    plan = make_plan(
        settings,
        {name: sizes[name] for name in names},
        config.train.seq_len,
        lambda step: samples_before(config.train, step),
    )
    return config, Mixture(settings, plan, {name: Path(name) for name in names}, {})


def saved(started, step, cursor=None):
    config, mixture = started
    identity = Identity(config=asdict(config), dataset_fingerprint=mixture.plan.fingerprint, mixture=mixture.plan)
    cursor = samples_before(config.train, step + 1) if cursor is None else cursor
    return Manifest(progress=Progress(step=step, cursor=cursor), identity=identity)


def resume(manifest, now):
    config, mixture = now
    changed = check_resume(manifest, asdict(config), None, "step_x")
    return continue_mixture(manifest, mixture, config.train, changed, "step_x").plan


LATER = {"from_step": 21, "mixture": {"web": 1, "zh": 1}}
STARTED = run({"web": 0.7, "code": 0.3}, [LATER])


def test_an_unchanged_run_keeps_its_plan_whatever_it_skipped():
    assert resume(saved(STARTED, 10, cursor=95), STARTED) == STARTED[1].plan


def test_another_weight_is_refused_by_key():
    with pytest.raises(CheckpointError, match=r"data.mixture was .*'checkpoint.override=\[data.mixture\]"):
        resume(saved(STARTED, 10), run({"web": 0.6, "code": 0.4}, [LATER]))


def test_an_overridden_mixture_holds_from_the_checkpoint_on():
    plan = resume(saved(STARTED, 10), run({"web": 0.5, "zh": 0.5}, [LATER], override=["data.mixture"]))
    assert plan.phases == [
        Phase(0, {"code": 3, "web": 7}),
        Phase(80, {"web": 1, "zh": 1}),
        Phase(160, {"web": 1, "zh": 1}),
    ]
    past = np.arange(80)
    assert list(plan.sources) == ["code", "web", "zh"]
    names, old_names = list(plan.sources), list(STARTED[1].plan.sources)
    sources, own = plan.locate(past)
    old_sources, old_own = STARTED[1].plan.locate(past)
    assert [names[i] for i in sources] == [old_names[i] for i in old_sources] and np.array_equal(own, old_own)


def test_a_second_resume_keeps_the_changed_plan():
    first = saved(STARTED, 10)
    now = run({"web": 0.5, "zh": 0.5}, [LATER], override=["data.mixture"])
    plan = resume(first, now)
    again = saved((now[0], replace(now[1], plan=plan)), 15)
    assert resume(again, now) == plan


def test_a_future_phase_may_be_changed_and_a_past_one_may_not():
    other = {"from_step": 31, "mixture": {"code": 1}}
    plan = resume(saved(STARTED, 20), run({"web": 0.7, "code": 0.3}, [other], override=["data.phases"]))
    assert plan.phases == [Phase(0, {"code": 3, "web": 7}), Phase(240, {"code": 1})]
    with pytest.raises(CheckpointError, match=r"data.phases: the run is at step 21 \(sample 168\).*step 22 or later"):
        resume(saved(STARTED, 21), run({"web": 0.7, "code": 0.3}, [other], override=["data.phases"]))
    with pytest.raises(CheckpointError, match=r"data.phases: the run is at step 30"):
        early = {"from_step": 5, "mixture": {"code": 1}}
        resume(saved(STARTED, 30), run({"web": 0.7, "code": 0.3}, [early, LATER], override=["data.phases"]))


def test_a_phase_that_a_skip_made_begin_early_has_begun():
    """At step 18 the run is at sample 176 instead of 144, so it reads the phase of step 21, which begins at 160."""
    at = saved(STARTED, 18, cursor=176)
    other = {"from_step": 21, "mixture": {"code": 1}}
    with pytest.raises(CheckpointError, match=r"data.phases: .*must stay as they were \(data.phases\[0\]\)"):
        resume(at, run({"web": 0.7, "code": 0.3}, [other], override=["data.phases"]))
    with pytest.raises(CheckpointError, match=r"where data.phases\[0\] has replaced it"):
        resume(at, run({"web": 1}, [LATER], override=["data.mixture"]))
    added = {"from_step": 19, "mixture": {"code": 1}}
    with pytest.raises(ConfigError, match="is not after the phase before it"):
        run({"web": 0.7, "code": 0.3}, [LATER, added], override=["data.phases"])
    added["from_step"] = 22
    plan = resume(at, run({"web": 0.7, "code": 0.3}, [LATER, added], override=["data.phases"]))
    assert plan.phases == [*STARTED[1].plan.phases, Phase(200, {"code": 1})]


def test_a_phase_is_added_after_one_that_has_begun():
    added = {"from_tokens": 400 * TrainConfig().train.seq_len, "mixture": {"zh": 1}}
    plan = resume(saved(STARTED, 30), run({"web": 0.7, "code": 0.3}, [LATER, added], override=["data.phases"]))
    assert plan.phases == [*STARTED[1].plan.phases, Phase(400, {"zh": 1})]


def test_the_first_mixture_cannot_be_changed_once_a_phase_has_replaced_it():
    with pytest.raises(CheckpointError, match=r"data.mixture: .* at step 30, where data.phases\[0\] has replaced"):
        resume(saved(STARTED, 30), run({"web": 1}, [LATER], override=["data.mixture"]))


def test_the_steps_of_later_phases_are_counted_in_the_new_batch_size():
    """Steps 1 to 10 had 8 samples, and steps 11 to 20 have 16: the phase of step 21 begins at sample 240."""
    now = run({"web": 0.7, "code": 0.3}, [LATER], batch=16, override=["train.global_batch_size"])
    assert [phase.start for phase in resume(saved(STARTED, 10), now).phases] == [0, 240]
    assert [phase.start for phase in resume(saved(STARTED, 25), now).phases] == [0, 160]


def test_caps_are_checked_when_a_run_begins_or_changes_not_at_every_restart():
    """125 steps of 8 samples read zh four times, as its cap allows, whatever was skipped; 130 steps read more."""
    config, mixture = run({"web": 0.9, "zh": {"weight": 0.1, "max_epochs": 4}})
    new, skipped = Progress(), Progress(step=10, cursor=80 + 40, skip_ranges=[(20, 60)])
    config.train.steps = 125
    check_run_caps(mixture, config.train, new, None)
    check_run_caps(mixture, config.train, skipped, ["train.steps"])
    config.train.steps = 130
    check_run_caps(mixture, config.train, skipped, ["checkpoint.resume"])
    with pytest.raises(ConfigError, match="lower its weight, or prepare more of it"):
        check_run_caps(mixture, config.train, new, None)
    with pytest.raises(ConfigError, match=r"lower train.steps, .* weight with 'checkpoint.override=\[data.mixture\]"):
        check_run_caps(mixture, config.train, skipped, ["train.steps"])


@pytest.mark.parametrize("step", [10, 30])
@pytest.mark.parametrize("override", [[], ["data.mixture"]])
def test_a_moved_dataset_or_another_cap_changes_nothing(step, override):
    later = {"from_step": 21, "mixture": {"elsewhere/web": {"weight": 1, "max_epochs": 90}, "zh": 1}}
    now = run({"elsewhere/web": 0.7, "code": {"weight": 0.3, "max_epochs": 9}}, [later], override=override)
    manifest = saved(STARTED, step)
    assert resume(manifest, now) == STARTED[1].plan
    changed = check_resume(manifest, asdict(now[0]), None, "step_x")
    assert {"data.mixture", "data.phases"} <= changed.keys() and take_over(manifest, changed)[1] == []


@pytest.mark.parametrize(
    ("mixture", "phases", "heldout", "others"),
    [
        ({"web": 0.7, "code": 0.3}, [LATER], {"web", "zh"}, False),
        ({"web": 0.2, "code": 0.8}, [LATER], {"web", "code", "zh"}, False),  # the first weights stay
        ({"web": 1}, [LATER], {"web", "zh"}, True),  # code is gone
        ({"zh": 1}, [], {"zh"}, True),
    ],
)
def test_the_mean_of_the_held_out_loss_changes_only_with_its_sources(mixture, phases, heldout, others):
    now = run(mixture, phases, override=["data.mixture", "data.phases"])
    manifest = saved(STARTED, 10)
    names = {name for phase in now[1].phases for name in phase.sources}
    continued = replace(now[1], plan=resume(manifest, now), cards=dict.fromkeys(names))
    assert weighs_others(manifest, continued, heldout) == others


def test_another_dataset_under_a_name_is_refused():
    other = {**SIZES, "code": PlannedSource("another", 100)}
    with pytest.raises(DataError, match=r"the dataset code changed since step_x was written: .* is now another"):
        resume(saved(STARTED, 10), run({"web": 0.7, "code": 0.3}, [LATER], sizes=other))


def test_a_run_on_one_dataset_does_not_become_a_mixture():
    manifest = saved(STARTED, 10)
    manifest = replace(manifest, identity=replace(manifest.identity, mixture=None))
    with pytest.raises(CheckpointError, match="was trained on one dataset"):
        resume(manifest, STARTED)


def test_the_plan_survives_the_manifest():
    manifest = saved(STARTED, 10)
    assert Manifest.from_json(manifest.to_json()).identity.mixture == STARTED[1].plan
    alone = replace(manifest, identity=replace(manifest.identity, mixture=None))
    assert "mixture" not in alone.to_json()


def test_a_mixture_is_one_key_of_a_change():
    before, now = asdict(STARTED[0]), asdict(run({"web": 0.6, "zh": 0.4}, [LATER])[0])
    assert list(changed_keys(before, now)) == ["data.mixture"]
