"""Tuning on preference pairs: runs that resume to the bit with the reference that they kept, and exported rewards."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.commands import megatrain, metrics

from megatrain.config import CompressConfig, EvaluateConfig, ExportConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.errors import ConfigError
from megatrain.interop.load_model import load
from megatrain.verbs.comparison import measure
from megatrain.verbs.evaluate import evaluate, windows_of
from megatrain.verbs.export import export_

RUN = ["engine=native", "tracking=none", "launch.device=cpu", "train.global_batch_size=4", "train.micro_batch_size=2"]
TUNE = [*RUN, "data.paths=[pairs.jsonl]", "train.steps=6", "checkpoint.every=3", "train.eval_every=3", "optim.lr=1e-3"]


def done(folder, *words):
    result = megatrain(folder, *words)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a base of a few steps, pairs, and a run of direct preference optimisation on them."""
    folder = tmp_path_factory.mktemp("preferences")
    draw = random.Random(1)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(120):
            sides = [" ".join(draw.choices(words, k=draw.randrange(1, 6))) for words in (("yes", "si"), ("no", "nein"))]
            record = {"prompt": f"Say {number}", "chosen": sides[0], "rejected": sides[1]}
            file.write(json.dumps(record) + "\n")
    (folder / "text.txt").write_text("Say yes or si or no or nein.\n" * 400)
    tokenizer = ("tokenizer=byte_level_bpe", "tokenizer.vocab_size=300", "tokenizer.chat_template=chatml")
    done(folder, "prepare", "data=files", "data.name=text", "data.paths=[text.txt]", *tokenizer)
    shape = ("model=tiny", "model.num_layers=2", "model.hidden_size=32", "train.seq_len=96")
    done(folder, "train", *shape, *RUN, "data=files", "data.name=text", "run.name=base", "train.steps=2")
    done(folder, "tune", "runs/base", "method=dpo", *TUNE, "run.name=whole")
    return folder


def events(folder, run, kind):
    lines = (folder / "runs" / run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def weights(folder, run):
    (file,) = (folder / "runs" / run / "checkpoints" / "step_00000006").glob("*.safetensors")
    return load_file(file)


def test_the_margin_grows_and_the_reference_is_recorded(place):
    records = metrics(place, "whole")
    assert abs(records[0]["margin"]) < 1e-3 < records[-1]["margin"]
    assert records[0]["loss"] == pytest.approx(0.6931 + records[0]["sft_loss"], abs=1e-3)
    assert 0 <= records[-1]["heldout_accuracy"] <= 1 and records[-1]["heldout_accuracy_se"] >= 0
    assert [event["computed"] for event in events(place, "whole", "reference")] == [True]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(place, damaged):
    """With the reference that it kept, and with one that is computed again from the base after damage."""
    name = f"resumed-{damaged}"
    shutil.copytree(place / "runs" / "whole", place / "runs" / name, ignore=shutil.ignore_patterns("step_00000006"))
    kept = place / "runs" / name / "reference.bin"
    if damaged:
        content = bytearray(kept.read_bytes())
        content[7] ^= 1
        kept.write_bytes(content)
    done(place, "tune", "runs/base", "method=dpo", *TUNE, f"run.name={name}")
    assert [event["computed"] for event in events(place, name, "reference")] == [True, damaged]
    assert kept.read_bytes() == (place / "runs" / "whole" / "reference.bin").read_bytes()
    before, after = weights(place, "whole"), weights(place, name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for one, two in zip(metrics(place, "whole"), metrics(place, name), strict=True):
        assert one["loss"] == two["loss"] and one["margin"] == two["margin"]


def test_a_reward_model_is_scored_and_exported(place, capsys):
    done(place, "tune", "runs/base", "method=reward", *TUNE, "run.name=reward")
    reward_run, data = str(place / "runs" / "reward"), str(place / "data" / "pairs-base")
    capsys.readouterr()
    evaluate(EvaluateConfig(path=reward_run, data=data, device="cpu"))
    measured = json.loads(capsys.readouterr().out)
    last = metrics(place, "reward")[-1]
    assert measured["accuracy"] == last["heldout_accuracy"]
    assert measured["loss"] == pytest.approx(last["heldout_loss"], rel=1e-5)
    loaded = load(place / "runs" / "reward")
    with pytest.raises(ConfigError, match="has preference pairs, which have no loss of a text"):
        config = CompressConfig(path=reward_run, out="out", data=data, device="cpu")
        measure(loaded, windows_of(loaded), config, False)
    export_(ExportConfig(path=reward_run, out=str(place / "hf")))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(place / "hf")
    messages = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "si si"}]
    tokens = torch.tensor([ChatTemplate(loaded.tokenizer).encode(messages).ids])
    with torch.no_grad():
        scores, reward = loaded.build(torch.device("cpu"))(tokens), theirs(tokens).logits[0, 0]
    assert float(scores[0, -1]) == pytest.approx(float(reward), abs=1e-6) and abs(float(reward)) > 1e-3
    assert load(place / "hf").config.output == "score"
    with pytest.raises(ConfigError, match="reward model, which writes no text"):
        loaded.need_tokenizer()
