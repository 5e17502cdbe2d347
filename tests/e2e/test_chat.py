"""From a folder of text to a model that answers: a base model, conversations in its template, a tuned run, `chat`."""

from __future__ import annotations

import json
import random

import pytest
from support.commands import megatrain, metrics

BASE = [
    "train", "model=tiny", "model.num_layers=2", "model.hidden_size=32", "train.seq_len=64", "train.micro_batch_size=2",
    "train.global_batch_size=8", "optim.warmup_steps=5", "tracking=none", "train.eval_every=30", "engine=native",
]  # fmt: skip
TUNE = [
    *BASE, "checkpoint.init_from=runs/base", "data=chat", "data.name=talks", "data.packing=best_fit",
    "train.mask_documents=true", "train.reset_positions=true", "train.steps=60", "optim.lr=3e-3",
]  # fmt: skip


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
    done(folder, *BASE, "data=files", "data.name=text", "run.name=base", "train.steps=60", "optim.lr=3e-3")
    own = ("tokenizer=hf", "tokenizer.path=data/text/tokenizer")
    prepared = done(folder, "prepare", "data=chat", "data.name=talks", "data.paths=[talks.jsonl]", *own)
    assert "data.name=talks data.packing=best_fit train.mask_documents=true" in prepared.stderr
    done(folder, *TUNE, "run.name=one")
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
