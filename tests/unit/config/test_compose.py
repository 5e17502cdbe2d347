"""From overrides to a checked dataclass: defaults, precedence, types, bounds and error messages."""

import re

import pytest

from megatrain.config import VERBS, PrepareConfig, TrainConfig, walk
from megatrain.config.choices import GROUPS, choices_of
from megatrain.config.compose import compose
from megatrain.errors import ConfigError

PATHS = {
    "evaluate": ["path=x"],
    "generate": ["path=x"],
    "chat": ["path=x"],
    "serve": ["path=x"],
    "inspect": ["path=x"],
    "report": ["path=x"],
    "tune": ["path=x"],
    "tokenizers": ["path=x"],
}
PATHS |= {"merge": ["paths=[x,y]", "out=z"], "compress": ["path=x", "out=y"]}
PATHS |= {"tokenizer": ["out=t"], "export": ["path=x", "out=y"], "import": ["path=x", "out=y"]}


def refusal(verb: str, *overrides: str) -> str:
    """Return the message with which the overrides are refused."""
    with pytest.raises(ConfigError) as caught:
        compose(verb, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_composes_to_its_dataclass(verb):
    assert type(compose(verb, PATHS.get(verb, []))) is VERBS[verb]


def test_every_choice_of_every_group_composes_and_carries_its_own_name():
    choices = {group: choices_of(group) for group in GROUPS["train"]}
    assert all(choices.values())
    for turn in range(
        max(len(names) for names in choices.values())
    ):  # several groups at once, because composing is slow
        chosen = {group: names[turn % len(names)] for group, names in choices.items() if group != "experiment"}
        config = compose("train", [*(f"{group}={choice}" for group, choice in chosen.items()), "data.name=some"])
        for group in ("model", "engine", "optim", "precision", "launch", "tracking"):
            assert getattr(config, group).name == chosen[group]
        assert config.tokenizer.kind == chosen["tokenizer"]


@pytest.mark.parametrize("choice", choices_of("experiment"))
def test_every_experiment_composes(choice):
    compose("train", [f"experiment={choice}"])


def test_a_key_that_no_file_and_no_override_sets_has_the_schemas_default():
    config = compose("train", ["model=tiny"])
    assert config.train == TrainConfig().train
    assert config.checkpoint == TrainConfig().checkpoint


def test_the_command_line_wins_over_an_experiment_and_that_over_the_groups(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /precision: bf16\n"
        "model:\n  num_layers: 7\noptim:\n  lr: 0.5\ntrain:\n  steps: 11\n"
    )
    own = f"--config-dir={tmp_path}"
    config = compose("train", [own, "optim.lr=0.25", "experiment=mine", "precision=fp16"])
    assert (config.model.name, config.model.num_layers, config.train.steps) == ("tiny", 7, 11)
    assert (config.optim.lr, config.precision.name) == (0.25, "fp16")
    assert compose("train", [own, "experiment=mine", "model=small"]).model.name == "small"


def test_a_later_override_wins_over_an_earlier_one():
    assert compose("train", ["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize(
    "text", ["1e3", "007", "true", "null_", "1_000", "0x1f", "nan", "3.0", "[x]", "{x}", "a=b", "é x"]
)
def test_a_name_stays_exactly_as_typed(text):
    config = compose("evaluate", [f"path={text}", f"data={text}"])
    assert (config.path, config.data) == (text, text)


def test_the_names_of_a_run_and_its_dataset_may_look_like_numbers():
    config = compose("train", ["run.name=1e3", "data.name=007"])
    assert (config.run.name, config.data.name) == ("1e3", "007")


def test_text_may_be_quoted():
    assert compose("train", ["run.name='a,b'"]).run.name == "a,b"
    assert compose("train", ['run.name="null"']).run.name == "null"


@pytest.mark.parametrize(
    "text", ["Once, upon (a time)\nthere was {x: 'y'}", "${HOME}", "a=b", "", " two  spaces ", "\\n"]
)
def test_a_prompt_is_prose_and_stays_as_typed(text):
    config = compose("generate", ["path=x", f"prompt={text}", f"suffix={text}"])
    assert config.prompt == config.suffix == text
    config = compose("chat", ["path=x", f"prompt={text}", f"system={text}"])
    assert config.prompt == config.system == text


def test_the_run_is_named_after_model_and_data_unless_it_has_a_name():
    assert compose("train", ["model=tiny", "data.name=mine"]).run.name == "tiny-mine"
    assert compose("train", ["run.name=other"]).run.name == "other"


def test_values_are_read_by_their_keys_type():
    config = compose(
        "train",
        ["optim.lr=1", "optim.betas=[0,0.5]", "deterministic=True", "data.workers=null", "data.paths=[a/**/*.txt, 7]"],
    )
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert (config.optim.betas, [type(beta) for beta in config.optim.betas]) == ([0.0, 0.5], [float, float])
    assert config.deterministic is True and config.data.workers is None
    assert config.data.paths == ["a/**/*.txt", "7"]
    assert compose("train", ["data.paths=['a,b',\"(c)\"]"]).data.paths == ["a,b", "(c)"]
    assert compose("train", ["data.paths=a/**/*.txt"]).data.paths == ["a/**/*.txt"], "one path needs no brackets"


def test_a_plus_in_front_of_a_key_or_group_changes_nothing():
    assert compose("train", ["+train.steps=3", "++seed=4", "+model=tiny"]).train.steps == 3


def test_a_value_may_refer_to_another_key():
    config = compose(
        "train", ["run.name=steps-${train.steps}", "train.steps=5", "train.micro_batch_size=${train.steps}"]
    )
    assert (config.run.name, config.train.micro_batch_size) == ("steps-5", 5)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("trian.steps", "train.steps"),
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("tokenizer.vocab_siz", "tokenizer.vocab_size"),
        ("model.hidden", "model.hidden_size"),
        ("model.heads", "model.num_heads"),
        ("optimizer", "optim=<choice>"),
        ("models", "model=<choice>"),
        ("batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("train.batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("optim.clip_grad", "optim.grad_clip"),
        ("nproc_per_node", "launch.nproc_per_node"),
        ("data.path", "data.paths"),
        ("max_steps", "train.steps"),
        ("num_train_steps", "train.steps"),
        ("n_layers", "model.num_layers"),
        ("optim.weight_dacay", "optim.weight_decay"),
        ("block_size", "train.seq_len"),
        ("dtype", "precision=<choice>"),
        ("seq-len", "train.seq_len"),
    ],
)
def test_a_key_that_does_not_exist_is_refused_with_the_nearest_one(key, meant):
    assert refusal("train", f"{key}=1") == f"unknown key {key}; did you mean {meant}?"
    assert refusal("train", f"+{key}=1") == f"unknown key {key}; did you mean {meant}?"


def test_a_key_unlike_any_other_is_refused_with_the_existing_ones():
    message = refusal("train", "parallel.xq=2")
    assert "unknown key parallel.xq" in message and "parallel.zero" in message
    message = refusal("train", "xyzzy=2")
    assert "unknown key xyzzy" in message and "model" in message and "experiment" in message


@pytest.mark.parametrize(
    ("verb", "override", "says"),
    [
        (
            "train",
            "model=tinny",
            r"unknown choice model=tinny; did you mean model=tiny\? \(choices of model: .*small.*",
        ),
        (
            "train",
            "precision=float7",
            r"unknown choice precision=float7.*\(choices of precision: bf16, fp16, fp32, fp8\)",
        ),
        ("train", "experiment=quikstart", "did you mean experiment=quickstart"),
        (
            "train",
            "data=mine",
            r"^unknown choice data=mine, and no .*: megatrain prepare <files> data.name=mine",
        ),
        ("train", "model=124m", "did you mean model=gpt2_124m"),
        ("train", "model=my.yaml", r"model=my.yaml: no such file \(choices of model"),
        ("prepare", "model=tiny", "unknown key model"),
        ("train", "model=a,b", "model=a,b: several values make a sweep"),
        ("train", "train.steps=1,2", "train.steps=1,2: several values make a sweep"),
        ("train", "run.name=a,b", "run.name=a,b: several values make a sweep"),
        ("train", "seed=choice(1,2)", "several values make a sweep"),
        ("train", "seed=range(1,5)", "several values make a sweep"),
        ("train", "train.steps=ten", "train.steps=ten: expected a whole number, given text"),
        ("train", "train.steps=1e3", r"expected a whole number, given a number \(write 1000\)"),
        ("train", "train.steps=2.5", "expected a whole number, given a number"),
        ("train", "train.steps=true", "expected a whole number, given a boolean"),
        ("train", "optim.lr=None", r"expected a number, given the text None \(no value is null\)"),
        ("train", "train.steps=", "expected a whole number, given text"),
        ("train", "train.steps=null", "train.steps cannot be null; give a whole number"),
        ("train", "data.workers=many", "expected a whole number or null, given text"),
        ("train", "optim.lr=fast", "optim.lr=fast: expected a number, given text"),
        ("train", "deterministic=1", "expected true or false, given a whole number"),
        (
            "train",
            "optim.betas=0.9",
            r"expected a list of numbers such as .*, given a number \(write 'optim.betas=\[0.9\]'\)",
        ),
        (
            "train",
            "optim.betas=[0.9,x]",
            r"expected a list of numbers such as \[0.9,0.95\], given a list with text \(x\)$",
        ),
        ("train", "optim.betas=[0.9,null]", r"such as \[0.9,0.95\], given a list with null$"),
        ("train", "optim.betas={}", r"given an empty mapping \(write"),
        ("train", "data.mixture={a: 0.5, b: 1, a: 0.5}", r"data.mixture=.*: a is given twice in one mapping"),
        (
            "train",
            "data.phases=[{from_step: 2, mixture: {a: 1, a: 2}}]",
            r"data.phases=.*: a is given twice in one map",
        ),
        ("prepare", "clean.steps=[{length: {min_characters: 1, min_characters: 2}}]", "min_characters is given twice"),
        ("train", "optim.betas=[0.9]", "expected two numbers, given 1"),
        ("train", "data.paths=a.txt,b", r"a list is in brackets: write 'data.paths=\[a.txt,b\]'"),
        ("train", "optim.betas=0.9,0.95", r"a list is in brackets: write 'optim.betas=\[0.9,0.95\]'"),
        ("train", "optim.betas=[0.9,0.95", r"the closing \] is missing: write 'optim.betas=\[0.9,0.95\]'"),
        ("train", "data.paths=[a", r"the closing \] is missing: write 'data.paths=\[a\]'"),
        ("train", "data.phases=[{from_step: 2", r"the closing }\] is missing: write 'data.phases=\[{from_step: 2}\]'"),
        ("train", "data.mixture={a: 'x", "quote special characters"),
        ("train", "launch.sbatch_options=--qos=high", r"\(write 'launch.sbatch_options=\[--qos=high\]'\)"),
        ("train", "run={name: x}", "run is a group of keys, not a key; set one of run.name, run.dir"),
        ("train", "~run.name", "cannot be deleted"),
        (
            "train",
            "train.steps",
            "cannot read 'train.steps': an override is key=value.*; a value of several words needs",
        ),
        ("train", "=3", "cannot read '=3'"),
        ("train", "model@other=tiny", "packages in an override"),
        ("train", "train.steps=[1", r"cannot read train.steps=\[1"),
        ("train", "seed=${nothing}", "Interpolation key 'nothing' not found.*full_key: seed"),
        ("train", "hydra.run.dir=x", "unknown key hydra.run.dir"),
        ("train", "data.name=???", r"data.name is not set; give data.name=... \(dataset identity"),
        ("evaluate", "split=heldout", r"path is not set; give path=... \(run folder"),
    ],
)
def test_an_unreadable_value_is_refused_with_its_key_and_the_expected_type(verb, override, says):
    assert re.search(says, refusal(verb, override))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=0", "train.steps=0 is out of range: must be at least 1"),
        ("train.steps=" + "9" * 400, r"train.steps=9{36}\.\.\. is out of range: must be at least 1 and at most 9223"),
        ("seed=9223372036854775808", "seed=9223372036854775808 is out of range"),
        ("launch.timeout_s=1e300", "launch.timeout_s=1e\\+300 is out of range: must be above 0 and at most 1e\\+07"),
        ("optim.lr=0", "optim.lr=0.0 is out of range: must be above 0"),
        ("optim.lr=nan", "optim.lr=nan is out of range"),
        ("optim.lr=inf", "optim.lr=inf is out of range: must be above 0 and finite"),
        ("model.dropout=1", "model.dropout=1.0 is out of range: must be at least 0 and below 1"),
        ("optim.min_lr_ratio=1.5", "must be at least 0 and at most 1"),
        ("optim.betas=[0.9,1]", r"optim.betas=\[0.9, 1.0\] is out of range: each must be at least 0 and below 1"),
        ("parallel.zero=4", "parallel.zero=4 is not one of 0, 1, 2, 3"),
        ("optim.schedule=cosin", "optim.schedule=cosin is not one of .*; did you mean cosine"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_allowed_range(override, says):
    assert re.search(says, refusal("train", override))


@pytest.mark.parametrize("schema", VERBS.values())
def test_every_key_has_a_meaning_and_every_default_is_within_its_own_bounds(schema):
    from megatrain.config.compose import check_bounds

    assert all(f.metadata["help"] for f in walk(schema).values())
    mandatory = {name: "x" for name, f in walk(schema).items() if f.default == "???" and "." not in name}
    check_bounds(schema(**mandatory))


def test_composing_leaves_no_state_behind():
    from hydra.core.global_hydra import GlobalHydra

    compose("train", ["model=tiny"])
    assert not GlobalHydra.instance().is_initialized()
    assert compose("prepare", []) == compose("prepare", [])
    assert type(compose("prepare", [])) is PrepareConfig
