"""What a command may say of the checkpoint that it continues or starts from, before and in the ranks."""

import shlex
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from megatrain.checkpoint.manifest import Override, read_manifest, write_manifest
from megatrain.checkpoint.weights import MEANING
from megatrain.config import TrainConfig
from megatrain.config.compose import compose
from megatrain.config.plain import plain
from megatrain.data.card import Card, TokenizerCard
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.interop.load_model import load
from megatrain.optim.schedule import learning_rate
from megatrain.report.run_page import collect
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.inspect import checkpoint_facts, highlights
from megatrain.verbs.path_checks import check_writable
from megatrain.verbs.start_checks import check_origin, ignored_keys, unreached_phases, with_checkpoint_model
from megatrain.verbs.value_checks import check_values


def command(*words):
    """The config of a `train` command, as the command line composes it."""
    config = compose("train", with_checkpoint_model("train", list(words)))
    check_values(config)
    return config


@pytest.fixture
def started(dataset, tmp_path):
    """Return a function that composes a command on the dataset and checks it against the checkpoint it would load."""

    def check(*words, runs=tmp_path):
        place = (f"data.dir={dataset.parent}", f"data.name={dataset.name}", f"run.dir={runs}", "train.seq_len=16")
        config = command(*place, *words)
        check_origin(config, Card.load(dataset))
        return config

    return check


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A finished run of four steps that a test may change."""
    shutil.copytree(finished, tmp_path / "runs" / "first")
    return tmp_path / "runs" / "first"


def events(run, kind):
    return [event for event in read_events(run / "events.jsonl") if event["kind"] == kind]


# ---------------------------------------------------------------------------------------------- init_from


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_checkpoints_model_is_the_default_of_model(name, family, started):
    """No model.* key is needed; one that is given counts, and so do a preset and an experiment."""
    folder, model, _ = family(name)
    assert started(f"checkpoint.init_from={folder}").model == model
    assert started(f"checkpoint.init_from={folder}", "model.name='a b'").model == replace(model, name="a b")
    for chosen, layers in (("model=tiny", 4), ("experiment=quickstart", 2)):
        config = compose("train", with_checkpoint_model("train", [chosen, f"checkpoint.init_from={folder}"]))
        assert (config.model.name, config.model.num_layers) == ("tiny", layers)


CONTRADICTIONS = [
    ("llama", "tie_embeddings", "true"), ("gpt2", "tie_embeddings", "false"), ("llama", "num_layers", 1),
    ("llama", "num_layers", 3), ("llama", "num_heads", 2), ("llama", "num_kv_heads", 4),
    ("llama", "hidden_size", 64), ("llama", "head_size", 16), ("llama", "ffn_size", 64), ("llama", "norm", "layernorm"),
    ("llama", "norm_eps", 1e-6), ("llama", "activation", "gelu"), ("gpt2", "position", "rope"),
    ("llama", "rope_theta", 500000), ("llama", "vocab_size", 512), ("llama", "qk_norm", "true"),
    ("llama", "dropout", 0.1), ("llama", "max_seq_len", 128), ("llama", "num_kv_heads", "null"),
    ("llama", "bias", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), CONTRADICTIONS)
def test_a_contradicted_key_of_the_model_is_refused_with_both_values(name, key, value, family, started):
    """The advice names the override where there is one; where weights would be noise, none is offered or accepted."""
    folder, model, _ = family(name)
    words = (f"checkpoint.init_from={folder}", f"model.{key}={value}")
    both = rf"model\.{key} is {plain(getattr(model, key))} there and"
    with pytest.raises(CheckpointError, match=both) as caught:
        started(*words)
    allow = f"checkpoint.override=[model.{key}]"
    assert (f"'{allow}'" in str(caught.value)) == (f"model.{key}" not in MEANING)
    if f"model.{key}" in MEANING:
        with pytest.raises(ConfigError, match=f"model.{key}: weights mean nothing"):
            started(*words, allow)
    elif key != "max_seq_len" or name == "llama":
        started(*words, allow)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_advice_for_longer_sequences_is_accepted_at_once(name, family, started):
    folder = family(name)[0]
    words = [f"checkpoint.init_from={folder}", "train.seq_len=96"]
    with pytest.raises(ConfigError, match=r"longer than model.max_seq_len=64") as caught:
        check_values(command(*words))
    advice = str(caught.value).partition("; give ")[2]
    check_values(command(*words, advice.split()[0].strip(",")))
    if name == "gpt2":
        assert advice.endswith("(the weights of checkpoint.init_from have learned positions for 64 tokens)")
        return
    longer = shlex.split(advice.partition(", or ")[2].replace(" with ", " "))
    check_values(command(*words, *longer))
    started(*words, *longer)


def test_a_missing_checkpoint_comes_before_the_sizes_of_a_default_model():
    with pytest.raises(ConfigError, match=r"checkpoint\.init_from=nowhere: no such file or folder"):
        command("checkpoint.init_from=nowhere", "train.seq_len=100000")


def test_learned_positions_cannot_grow(family, started):
    folder = family("gpt2")[0]
    with pytest.raises(CheckpointError, match=r"learned positions for 64 tokens"):
        started(f"checkpoint.init_from={folder}", "model.max_seq_len=96", "checkpoint.override=[model.max_seq_len]")


def test_tensors_that_are_not_the_described_models_are_refused_by_name(family, started, tmp_path):
    """One left over, one missing, one of another shape: all are named, with or without an override."""
    folder = shutil.copytree(family("llama")[0], tmp_path / "other")
    manifest = read_manifest(folder)
    extra = manifest.tensors.pop("model.head.weight")
    manifest.tensors["model.lm_head.weight"] = extra
    norm = manifest.tensors["model.final_norm.weight"]
    manifest.tensors["model.final_norm.weight"] = replace(norm, shape=(31,))
    write_manifest(folder, manifest)
    for words in ((), ("model.num_layers=1", "checkpoint.override=[model.num_layers]")):
        with pytest.raises(
            CheckpointError, match=r"lacks head\.weight; it holds lm_head\.weight besides; it has final_norm"
        ):
            started(f"checkpoint.init_from={folder}", *words)


def test_data_of_another_tokenizer_is_refused_unless_it_is_meant(family, started, dataset, tmp_path):
    """The fingerprints decide; the advice prepares the data with the checkpoint's tokenizer."""
    folder = family("llama")[0]
    config = started(f"checkpoint.init_from={folder}")
    card = Card.load(dataset)
    assert card.tokenizer is not None
    other = replace(card, tokenizer=TokenizerCard("hf", "f" * 32, card.tokenizer.vocab_size, 0))
    with pytest.raises(ConfigError, match=r"another tokenizer.*tokenizer=sentencepiece tokenizer\.path=.*tokenizer"):
        check_origin(config, other)
    config.checkpoint.override = ["tokenizer"]
    check_origin(config, other)
    config.checkpoint.override = []
    check_origin(config, replace(card, tokenizer=None))  # unknown, as for `evaluate`


def test_keys_that_act_in_prepare_are_named_unless_the_dataset_has_their_values(dataset, tmp_path):
    place = shutil.copytree(dataset, tmp_path / "data" / "words")
    recorded = {"data": {"heldout_fraction": 0.2, "paths": ["texts"]}, "tokenizer": {"vocab_size": 500}}
    replace(Card.load(place), config=recorded).save(place)
    words = [f"data.dir={place.parent}", "data.name=words"]

    def told(*more):
        return list(ignored_keys(compose("train", [*words, *more]), [*words, *more]))

    assert not told("data.heldout_fraction=0.2", "data.paths=[texts]", "seed=7", "tokenizer=sentencepiece")
    assert not told("tokenizer.vocab_size=500") and not told("tokenizer.vocab_size=400")  # asked for, and found
    (line,) = told("tokenizer.vocab_size=4096")
    assert line.startswith(
        f"tokenizer.vocab_size=4096 acts in megatrain prepare and does nothing here; {place} has 400"
    )
    assert "has 0.2" in told("data.heldout_fraction=0.1")[0] and "has [texts]" in told("data.paths=[others]")[0]
    assert "data.overwrite=true acts in" in told("data.overwrite=true")[0]
    assert "tokenizer.kind=hf acts in" in told("tokenizer=hf")[0]
    saved = tmp_path / "config.yaml"
    saved.write_text("data:\n  heldout_fraction: 0.1\n")
    assert not told(f"--config={saved}")


def test_both_ways_out_of_another_vocabulary_work_as_printed(family, started, dataset):
    """The first message names the tokenizers, and neither way leads to a second refusal."""
    folder = family("llama")[0]
    config = started(f"checkpoint.init_from={folder}")
    recorded = {"data": {"kind": "files", "name": "words", "paths": ["my texts"], "bos": False}, "seed": 1234}
    other = replace(Card.load(dataset), tokenizer=TokenizerCard("hf", "f" * 32, 900, 0), config=recorded)
    with pytest.raises(ConfigError, match="with another tokenizer than that of") as refused:
        check_origin(config, other)
    message = str(refused.value)
    printed = shlex.split(message.partition("(megatrain prepare ")[2].partition(") and give")[0])
    prepared = compose("prepare", printed)
    assert prepared.data.paths == ["my texts"] and prepared.data.name == "words_2"
    assert prepared.tokenizer.path == str(folder / "tokenizer")
    meant = shlex.split(message.partition("if it is meant, add ")[2].partition(" (")[0])
    config = started(f"checkpoint.init_from={folder}", *meant)
    check_origin(config, other)
    config.checkpoint.override = ["tokenizer"]
    with pytest.raises(
        ConfigError, match=r"'checkpoint\.override=\[tokenizer,model\.vocab_size\]' model\.vocab_size=900"
    ):
        check_origin(config, other)


def test_ranks_refuse_what_the_command_line_would(family, train_job, tmp_path):
    """Under torchrun no agent has compared anything."""
    folder = family("llama")[0]
    words = {"checkpoint__init_from": str(folder), "model__tie_embeddings": True, "model__init_std": 0.3}
    with pytest.raises(CheckpointError, match=r"model\.tie_embeddings is false there and true here"):
        train_job(tmp_path, **words)
    assert not events(tmp_path / "first", "start")


def test_deliberate_differences_take_the_weights_that_fit(family, train_job, tmp_path):
    """One layer fewer and a tied head: the rest is bit for bit the checkpoint's, and the event names what was left."""
    folder, _, built = family("llama")
    words = {"checkpoint__init_from": str(folder), "optim__lr": 1e-30, "train__steps": 1, "model__num_layers": 1}
    allowed = {"checkpoint__override": ["model.num_layers", "model.tie_embeddings"]}
    assert train_job(tmp_path, **words, model__tie_embeddings=True, **allowed) == 0
    own = dict(built.named_parameters())
    taken = load(tmp_path / "first").weights
    assert "head.weight" not in taken and taken.keys() < own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in taken.items())
    (event,) = events(tmp_path / "first", "init_from")
    assert event["changed"] == ["model.num_layers 2 → 1", "model.tie_embeddings false → true"]
    assert "drawn" not in event and set(event["left"]) == own.keys() - taken.keys()


def test_new_parts_are_drawn_and_the_others_taken(family, train_job, tmp_path):
    """An untied head and a third layer on a tied model of two."""
    folder, model, built = family("gpt2")
    changes = {f"model__{name}": value for name, value in asdict(model).items()}
    changes |= {"model__num_layers": 3, "model__tie_embeddings": False}
    allowed = {
        "checkpoint__override": ["model.num_layers", "model.tie_embeddings"],
        "checkpoint__init_from": str(folder),
    }
    assert train_job(tmp_path, **changes, **allowed, optim__lr=1e-30, train__steps=1) == 0
    own, found = dict(built.named_parameters()), load(tmp_path / "first").weights
    assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-20) for name, tensor in own.items())
    drawn = found.keys() - own.keys()
    assert {name.split(".")[0] for name in drawn} == {"head", "blocks"} and float(found["head.weight"].std()) > 0
    assert set(events(tmp_path / "first", "init_from")[0]["drawn"]) == drawn


def test_a_run_does_not_start_from_itself(started, finished):
    """The default name may be that of the run whose weights are asked for: it would be continued in silence."""
    for place in (finished, finished / "checkpoints" / "step_00000004"):
        with pytest.raises(ConfigError, match=r"belongs to the run first itself.*run\.name=<new name>"):
            started(f"checkpoint.init_from={place}", "run.name=first", runs=finished.parent)


# ---------------------------------------------------------------------------------------------- resume


def resuming(finished, *words):
    """A command that continues the finished run, with further words."""
    model = [f"model.{name}={value}" for name, value in read_manifest_model(finished).items()]
    return [
        *model, "run.name=first", "engine=native", "parallel.zero=0", "tracking=none", "train.global_batch_size=4",
        "checkpoint.every=2", "train.steps=6", *words,
    ]  # fmt: skip


def read_manifest_model(run):
    model = read_manifest(run / "checkpoints" / "step_00000004").identity.config["model"]
    words = {None: "null", True: "true", False: "false"}
    return {name: words[value] if value is None or isinstance(value, bool) else value for name, value in model.items()}


def test_a_resume_is_refused_before_ranks_start(started, finished):
    """By key and with what would work; the printed advice is accepted."""
    runs = finished.parent
    started(*resuming(finished), runs=runs)
    started(*resuming(finished, "model.name=other"), runs=runs)
    with pytest.raises(
        CheckpointError, match=r"optim\.lr was 0\.0003 and is now 0\.01.*'checkpoint.override=\[optim\.lr\]'"
    ):
        started(*resuming(finished, "optim.lr=1e-2"), runs=runs)
    started(*resuming(finished, "optim.lr=1e-2", "checkpoint.override=[optim.lr]"), runs=runs)
    back = f"checkpoint.resume={finished / 'checkpoints' / 'step_00000002'}"
    started(*resuming(finished, back), runs=runs)
    for word in ("optim.lr=1e-2", "seed=5"):
        with pytest.raises(CheckpointError, match=r"step_00000002 cannot continue"):
            started(*resuming(finished, back, word), runs=runs)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        started(*resuming(finished, "checkpoint.resume=never"), runs=runs)
    with pytest.raises(CheckpointError, match="began from no other weights"):
        started(*resuming(finished, f"checkpoint.init_from={runs}"), runs=runs)


def test_another_dataset_is_refused_before_ranks_start(started, finished, dataset):
    config = command(
        *resuming(finished), f"run.dir={finished.parent}", f"data.dir={dataset.parent}", "train.seq_len=16"
    )
    card = replace(Card.load(dataset), fingerprint="0" * 32)
    assert card.tokenizer is not None
    with pytest.raises(DataError, match=r"the dataset changed.*checkpoint\.init_from="):
        check_origin(config, card)
    other = TokenizerCard("hf", "f" * 32, card.tokenizer.vocab_size, 0)
    with pytest.raises(DataError, match=r"or start a new run with run\.name=<new name>$"):
        check_origin(config, replace(card, tokenizer=other))


def test_a_name_that_no_override_can_have_is_refused():
    """With the reason, and the nearest name."""
    for name, says in (
        ("optim.Lr", "did you mean optim.lr"), ("train.seq_len", "order of its samples"),
        ("train.steps", "may change it anyway"), ("model.hidden_size", "weights mean nothing"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            command(f"checkpoint.override=[{name}]")


def test_an_overridden_run_keeps_place_and_moments_and_says_what_changed(finished_copy, train_job, tmp_path, capfd):
    """The next loss is that of the unchanged run, the update is not; events, manifest, report and inspect record it."""
    unchanged = shutil.copytree(finished_copy, tmp_path / "plain" / "first")
    assert train_job(tmp_path / "plain", train__steps=6) == 0
    changes = {"optim__lr": 1e-2, "optim__weight_decay": 0.0, "train__steps": 6}
    with pytest.raises(CheckpointError, match=r"optim\.lr.*optim\.weight_decay"):
        train_job(tmp_path / "runs", **changes)
    capfd.readouterr()
    allowed = ["optim.lr", "optim.weight_decay"]
    assert train_job(tmp_path / "runs", **changes, checkpoint__override=allowed) == 0
    plain, found = ({r["step"]: r for r in read_metrics(run / "metrics.jsonl")} for run in (unchanged, finished_copy))
    assert found[5]["loss"] == plain[5]["loss"] and found[5]["batch_hash"] == plain[5]["batch_hash"]
    assert found[5]["grad_norm"] == plain[5]["grad_norm"] and found[6]["loss"] != plain[6]["loss"]
    config = replace(TrainConfig().optim, lr=1e-2)
    assert found[5]["lr"] == learning_rate(config, 5, 6)
    told = capfd.readouterr().err
    for line in (
        "optim.lr 0.0003 → 0.01 (checkpoint.override)",
        "train.steps 4 → 6\n",
        "learning rate of step 5 3e-05 →",
    ):
        assert f"changed: {line}" in told
    manifest = read_manifest(finished_copy / "checkpoints" / "step_00000006")
    assert manifest.identity.overrides[0] == Override(4, "optim.lr", 3e-4, 1e-2)
    assert manifest.counters.optimizer.step == 6
    assert "optim.lr 0.0003 → 0.01 (step 4)" in str(checkpoint_facts(manifest))
    shown = dict(collect(finished_copy)["facts"])["changed on a resume"]
    assert shown == "optim.lr 0.0003 → 0.01 (step 4); optim.weight_decay 0.1 → 0 (step 4)"
    assert {event["key"] for event in events(finished_copy, "change")} >= {*allowed, "train.steps"}
    assert train_job(tmp_path / "runs", **changes, checkpoint__override=allowed) == 0, "the same command again"
    assert train_job(tmp_path / "runs", **(changes | {"train__steps": 7})) == 0, "and without the override"
    last = read_manifest(finished_copy / "checkpoints" / "step_00000007")
    assert last.identity.overrides == manifest.identity.overrides


def test_more_steps_say_how_the_learning_rate_goes_on(finished_copy, train_job, capfd):
    """A finished cosine run that is extended learns faster again; batch size and skip ranges can be overridden."""
    words = {"train__steps": 8, "train__global_batch_size": 8, "train__skip_ranges": [[20, 24]]}
    assert (
        train_job(finished_copy.parent, **words, checkpoint__override=["train.global_batch_size", "train.skip_ranges"])
        == 0
    )
    told = capfd.readouterr().err
    now = learning_rate(TrainConfig().optim, 5, 8)
    assert f"changed: learning rate of step 5 3e-05 → {now:.4g}" in told and now > 1e-4
    last = read_manifest(finished_copy / "checkpoints" / "step_00000008").progress
    assert (last.cursor, last.skip_ranges) == (4 * 4 + 4 * 8 + 4, [(20, 24)])


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew_in_silence(started, finished_copy, train_job):
    """Refused before ranks start and by the ranks; the named key starts anew and keeps the old records aside."""
    runs = finished_copy.parent
    words = resuming(finished_copy)
    shutil.rmtree(finished_copy / "checkpoints")
    message = r"had a checkpoint of step 4, but .* holds none: .* checkpoint\.resume=never to start anew"
    with pytest.raises(CheckpointError, match=message):
        started(*words, runs=runs)
    with pytest.raises(CheckpointError, match=message):
        train_job(runs)
    assert len(read_metrics(finished_copy / "metrics.jsonl")) == 4
    started(*words, "checkpoint.resume=never", runs=runs)
    assert train_job(runs, checkpoint__resume="never", train__steps=2) == 0
    assert len(read_metrics(finished_copy / "metrics.jsonl")) == 2
    assert list(finished_copy.glob("metrics.cut-*.jsonl"))


def test_inspect_shows_the_whole_shape():
    """Sizes that null stands for included."""
    shown = dict(highlights({"model": {"num_heads": 4, "hidden_size": 32, "norm_eps": 1e-6, "tie_embeddings": False}}))
    assert shown == {
        "model.num_heads": "4", "model.hidden_size": "32", "model.norm_eps": "1e-06", "model.tie_embeddings": "false",
        "model.num_kv_heads": "4", "model.head_size": "8", "model.ffn_size": "128",
        "model.attention_bias": "none",
    }  # fmt: skip


def test_a_loop_of_links_is_refused_and_not_followed(started, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    started("model=tiny", runs=tmp_path / "a")  # raises no error of its own: path_checks says what is wrong
    with pytest.raises(ConfigError, match="is a link to nowhere"):
        check_writable("run.dir", tmp_path / "a" / "run")


def test_phases_after_the_end_of_the_run_are_named():
    phases = "[{from_step: 9, mixture: {b: 1}}, {from_tokens: 5121, mixture: {c: 1}}]"
    words = ["data=mixture", "data.mixture={a: 1}", f"data.phases={phases}", "train.seq_len=64", "data.name=m"]
    words += ["train.global_batch_size=8"]
    assert list(unreached_phases(compose("train", [*words, "train.steps=11"]))) == []
    assert list(unreached_phases(compose("train", [*words, "train.steps=10"]))) == [
        "data.phases[1] begins after 5,121 tokens, after the end of the run (train.steps=10, 5,120 tokens), so it has "
        "no effect"
    ]
    both = list(unreached_phases(compose("train", [*words, "train.steps=8"])))
    assert len(both) == 2 and both[0].startswith("data.phases[0] begins at step 9, after the end of the run")
