"""From a folder of text to a model that answers: a base model, conversations in its template, a tuned run, `chat`."""

from __future__ import annotations

import json
import random

import pytest
from support.commands import megatrain, metrics

LOOP = [
    "train.seq_len=64", "train.micro_batch_size=2", "train.global_batch_size=8", "optim.warmup_steps=5",
    "tracking=none", "train.eval_every=30", "engine=native", "train.steps=60", "optim.lr=3e-3",
]  # fmt: skip
TUNE = ["tune", "runs/base", "data.paths=[talks.jsonl]", "data.name=talks", *LOOP]


def done(folder, *words, **options):
    result = megatrain(folder, *words, **options)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return a folder with a base model, conversations, and the run `one` of a single process on them."""
    folder = tmp_path_factory.mktemp("chat")
    draw = random.Random(1)
    numbers = [draw.randrange(100, 1000) for _ in range(400)]
    with (folder / "talks.jsonl").open("w") as file:
        for number in numbers:
            question = f"What comes after {number}?"
            reply = f"The answer is {number + 1}."
            file.write(json.dumps({"prompt": question, "completion": reply}) + "\n")
    with (folder / "text.jsonl").open("w") as file:
        for number in range(2000):
            file.write(
                json.dumps({"text": f"What comes after {number % 999}? The answer is {number % 999 + 1}."}) + "\n"
            )
    tokenizer = ("tokenizer=byte_level_bpe", "tokenizer.vocab_size=320", "tokenizer.chat_template=chatml")
    done(folder, "prepare", "data=files", "data.name=text", "data.paths=[text.jsonl]", *tokenizer)
    small = ("model=tiny", "model.num_layers=2", "model.hidden_size=32")
    done(folder, "train", *small, *LOOP, "data=files", "data.name=text", "run.name=base")
    tuned = done(folder, *TUNE, "run.name=one")
    assert "[[The answer is " in tuned.stdout, "what counts is shown before training"
    return folder


def test_only_replies_are_learnt_and_the_model_answers_in_their_form(tuned):
    records = metrics(tuned, "one")
    card = json.loads((tuned / "data" / "talks" / "card.json").read_text())
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["tokens"] < 0.7 * 60 * 8 * 64, "questions, markers and padding do not count"
    assert records[-1]["heldout_loss"] < 0.7 * records[0]["loss"]
    assert card["splits"]["train"]["documents"] > 300
    reply = done(tuned, "chat", "runs/one", "prompt=What comes after 712?", "temperature=0", "max_new_tokens=30").stdout
    assert reply.startswith("The answer is ") and reply.endswith(".\n")


@pytest.mark.parametrize(
    "layout",
    [("parallel.tp=2",), ("engine=deepspeed", "parallel.zero=3")],
    ids=lambda layout: layout[-1],
)
def test_every_layout_gives_the_same_run(tuned, layout):
    """Replies are of unequal lengths, so that a mean over a rank's tokens would differ from that over all."""
    name = f"two-{layout[-1].replace('=', '-')}"
    done(tuned, *TUNE, f"run.name={name}", "launch.nproc_per_node=2", *layout)
    one, two = metrics(tuned, "one"), metrics(tuned, name)
    assert [record["batch_hash"] for record in two] == [record["batch_hash"] for record in one]
    assert [record["tokens"] for record in two] == [record["tokens"] for record in one]
    for key in ("loss", "heldout_loss"):
        expected = [record[key] for record in one[:30] if key in record]
        assert [record[key] for record in two[:30] if key in record] == pytest.approx(expected, rel=1e-4)


def test_the_same_command_continues_the_run(tuned):
    assert "nothing to do" in done(tuned, *TUNE, "run.name=one").stdout
    assert "nothing to do" in done(tuned, "train", "runs/one").stdout


def test_low_rank_layers_on_a_model_of_others_are_tuned_merged_and_exported(tuned):
    """The base is a Hugging Face folder; `method.epochs` gives the steps; a tuned run is a base itself."""
    done(tuned, "export", "runs/base", "out=theirs")
    words = [word for word in TUNE if not word.startswith(("train.steps", "engine", "train.eval", "data.name"))]
    words[1] = "theirs"
    low_rank = done(tuned, *words, "method.epochs=0.5", "method.lora.rank=4")
    assert "importing theirs into runs/theirs-imported" in low_rank.stderr
    samples = json.loads((tuned / "data" / "talks-theirs" / "card.json").read_text())["splits"]["train"]["documents"]
    records = metrics(tuned, "theirs-sft")
    assert len(records) <= -(-samples // 16) and records[-1]["loss"] < records[0]["loss"]
    done(tuned, "export", "runs/theirs-sft", "out=adapter", "adapter=true")
    assert (tuned / "adapter" / "adapter_model.safetensors").is_file()
    words[1] = "runs/theirs-sft"
    again = done(tuned, *words, "train.steps=5")
    assert "merging the low-rank layers of runs/theirs-sft/checkpoints/" in again.stderr
    assert metrics(tuned, "theirs-sft-sft")[0]["loss"] == pytest.approx(records[-1]["loss"], rel=0.1)
