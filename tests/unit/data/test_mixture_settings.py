"""How `data.mixture` and `data.phases` are written, what they mean, and what is refused by key."""

import math
from fractions import Fraction

import pytest

from megatrain.config import DataConfig
from megatrain.config.compose import compose
from megatrain.data.mixture import Phase, PlannedSource
from megatrain.data.mixture_settings import check_caps, make_plan, read_phases
from megatrain.errors import ConfigError
from megatrain.verbs.value_checks import check_values

SIZES = {name: PlannedSource(name, size) for name, size in (("code", 100), ("web", 900), ("zh", 25))}


def settings(mixture, phases=(), **others):
    return read_phases(DataConfig("m", kind="mixture", mixture=mixture, phases=list(phases), **others))


def planned(mixture, phases=(), seq_len=10, **others):
    found = settings(mixture, phases, **others)
    names = {name for phase in found for name in phase.sources}
    return make_plan(found, {n: SIZES[n] for n in names}, seq_len, lambda step: 8 * (step - 1))


def test_a_weight_is_taken_as_it_is_written():
    assert settings({"a": 0.1})[0].sources["a"].weight == Fraction(1, 10)
    assert planned({"web": 0.7, "code": 0.2, "zh": 0.1}).phases == [Phase(0, {"code": 2, "web": 7, "zh": 1})]
    assert planned({"web": 70, "code": 20, "zh": {"weight": 10}}).phases[0].weights == {"code": 2, "web": 7, "zh": 1}


def test_epochs_weigh_each_source_by_its_size():
    assert planned({"web": {"epochs": 1}, "code": {"epochs": 4.5}}).phases[0].weights == {"code": 1, "web": 2}


def test_a_temperature_takes_weights_from_sizes():
    assert planned({"web": None, "code": None}, mixture_temperature=1).phases[0].weights == {"code": 1, "web": 9}
    assert planned({"web": None, "code": {}}, mixture_temperature=2).phases[0].weights == {"code": 1, "web": 3}
    even = planned({"web": None, "code": None}, mixture_temperature=1e6).phases[0].weights
    assert even["web"] - even["code"] <= 1


@pytest.mark.parametrize("temperature", [1e-10, 1e-5, 0.001, 0.1])
def test_a_temperature_near_0_takes_the_largest_source_alone_which_is_refused(temperature):
    with pytest.raises(ConfigError, match=r"data.mixture: the share of code is below 1/100,000"):
        planned({"web": None, "code": None}, mixture_temperature=temperature)
    assert planned({"web": None}, mixture_temperature=temperature).phases[0].weights == {"web": 1}


def test_phases_begin_at_a_step_or_after_tokens():
    plan = planned(
        {"web": 1},
        [{"from_step": 4, "mixture": {"code": 1}}, {"from_tokens": 305, "mixture": {"web": 1, "zh": 3}}],
    )
    assert plan.phases == [Phase(0, {"web": 1}), Phase(24, {"code": 1}), Phase(31, {"web": 1, "zh": 3})]


def test_a_path_is_called_by_its_folder():
    source = settings({"/sets/web": 1})[0].sources["web"]
    assert source.place == "/sets/web"


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"web": -0.5, "code": 1}, r"data.mixture.web=-0.5: must be a finite number above 0"),
        ({"web": 0}, r"data.mixture.web=0: .*leave a source out"),
        ({"web": math.nan}, r"data.mixture.web=nan: must be a finite"),
        ({"web": math.inf}, r"data.mixture.web=inf: must be a finite"),
        ({"web": True}, r"data.mixture.web=True: expected a weight"),
        ({"web": "much"}, r"data.mixture.web=much: expected a weight .* given text"),
        ({"web": None, "code": 1}, r"data.mixture.web: has neither a weight nor epochs"),
        ({"web": {"max_epochs": 2}}, r"data.mixture.web: has neither"),
        ({"web": {"wieght": 1}}, r"data.mixture.web: unknown key wieght; did you mean weight\?"),
        ({"web": {"weight": 1, "epochs": 2}}, r"data.mixture.web: has a weight and epochs"),
        ({"web": {"weight": [1]}}, r"data.mixture.web.weight=\[1\]: expected a number, given a list"),
        ({"web": {"epochs": 1}, "code": 1}, r"code has a weight and web has epochs"),
        ({"a/web": 1, "b/web": 1}, r"both called web"),
        ({}, r"data.mixture is empty"),
        ({"..": 1}, r"is not the name or the path"),
    ],
)
def test_mistakes_in_a_mixture_are_refused_by_key(mixture, message):
    with pytest.raises(ConfigError, match=message):
        settings(mixture)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (["web"], r"data.phases\[0\]: expected .* given text"),
        ([{"mixture": {"web": 1}}], r"data.phases\[0\]: give one of from_step and from_tokens, given neither"),
        ([{"from_step": 2, "from_tokens": 5, "mixture": {"web": 1}}], r"given from_step and from_tokens"),
        ([{"from_step": 1, "mixture": {"web": 1}}], r"data.phases\[0\].from_step=1: .*the run begins with is data.mix"),
        ([{"from_step": 2.5, "mixture": {"web": 1}}], r"from_step=2.5: expected a whole number"),
        ([{"from_step": 2}], r"data.phases\[0\].mixture: expected a mapping such as .*, given null$"),
        ([{"from_step": 2, "mixture": {}}], r"\[0\].mixture: expected a mapping such as .*, given an empty mapping$"),
        ([{"from_step": 10**23, "mixture": {"web": 1}}], rf"whole number, at least 2 and at most {2**62}$"),
        ([{"from_tokens": 10**23, "mixture": {"web": 1}}], rf"whole number, at least 1 and at most {2**62}$"),
        ([None], r"data.phases\[0\]: expected .* given null$"),
        ([{"from_step": 2, "mixture": {"web": -1}}], r"data.phases\[0\].mixture.web=-1"),
        ([{"form_step": 2, "mixture": {"web": 1}}], r"unknown key form_step; did you mean from_step"),
        (
            [{"from_step": 5, "mixture": {"web": 1}}, {"from_step": 5, "mixture": {"web": 1}}],
            r"data.phases\[1\].from_step=5 is not after the phase before it",
        ),
    ],
)
def test_mistakes_in_phases_are_refused_by_key(phases, message):
    with pytest.raises(ConfigError, match=message):
        settings({"web": 1}, phases)


def test_phases_in_steps_and_tokens_must_be_in_order():
    with pytest.raises(ConfigError, match=r"data.phases\[1\] begins at sample 10, and the phase before it at 80"):
        planned({"web": 1}, [{"from_step": 11, "mixture": {"zh": 1}}, {"from_tokens": 100, "mixture": {"code": 1}}])


def test_a_temperature_and_weights_contradict_each_other():
    with pytest.raises(ConfigError, match=r"data.mixture_temperature=2 takes the weights from the sizes, but .*web"):
        settings({"web": 1, "code": None}, mixture_temperature=2)


def test_a_share_too_small_to_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"data.mixture: the share of zh is below 1/100,000"):
        planned({"web": 1, "zh": 1e-7})


def test_a_source_that_would_run_out_under_its_cap_is_refused():
    mixture = {"web": 0.75, "zh": {"weight": 0.25, "max_epochs": 4}}
    phases, plan = settings(mixture), planned(mixture)
    check_caps(phases, plan, 400)
    with pytest.raises(ConfigError, match=r"data.mixture.zh: max_epochs=4 allows 100 samples of zh, .* reads 101 of"):
        check_caps(phases, plan, 404)
    check_caps(phases, plan, 404, [(0, 4)])  # what is skipped is not read


def test_the_cap_of_a_phase_counts_what_earlier_phases_read():
    later = [{"from_step": 26, "mixture": {"zh": {"weight": 1, "max_epochs": 2}}}]
    phases, plan = settings({"web": 3, "zh": 1}, later), planned({"web": 3, "zh": 1}, later)
    check_caps(phases, plan, 200)
    with pytest.raises(ConfigError, match=r"data.phases\[0\].mixture.zh: max_epochs=2"):
        check_caps(phases, plan, 201)


def test_the_command_line_reads_a_mixture_and_replaces_that_of_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nkind: mixture\nmixture:\n  web: 0.5\n  code: {weight: 0.5}\n")
    config = compose("train", [f"data={tmp_path / 'mine.yaml'}"])
    assert config.data.mixture == {"web": 0.5, "code": {"weight": 0.5}}
    config = compose("train", [f"data={tmp_path / 'mine.yaml'}", "data.mixture={zh: 1}"])
    assert config.data.mixture == {"zh": 1}
    config = compose("train", ["data=mixture", "data.mixture={web: {weight: 0.7, max_epochs: 2}, 2024: .3}"])
    assert config.data.mixture == {"web": {"weight": 0.7, "max_epochs": 2}, "2024": 0.3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.mixture={web: 1}"], "data.mixture: only data=mixture has one, given data=python_stdlib"),
        (["data.phases=[{from_step: 2, mixture: {web: 1}}]"], "data.phases: only data=mixture"),
        (["data=mixture"], "data.mixture is empty"),
        (["data=mixture", "data.mixture={web: 0}"], "data.mixture.web=0"),
    ],
)
def test_train_refuses_at_once(words, message):
    with pytest.raises(ConfigError, match=message):
        check_values(compose("train", words))


def test_a_mixture_is_not_prepared():
    with pytest.raises(ConfigError, match="data=mixture trains on datasets that are prepared already"):
        check_values(compose("prepare", ["data=mixture"]))


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match=r"data.mixture=web: expected a mapping such as .* given text"):
        compose("train", ["data=mixture", "data.mixture=web"])
