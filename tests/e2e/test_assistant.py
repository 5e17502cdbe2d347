"""The story of the assistant, shortened: its first stages run, each on what the one before made, and are measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "assistant.py"

SHORT = [
    "data:data.max_documents=60", "data:data.workers=1", "all:tracking=none", "all:launch.nproc_per_node=1",
    "base:train.steps=6", "base:optim.warmup_steps=1", "base:train.eval_every=0", "base:train.eval_steps=1",
    "sft:train.steps=2", "sft:optim.warmup_steps=1", "sft:train.eval_steps=1",
]  # fmt: skip


def test_stages_run_on_what_the_one_before_made_and_are_not_run_again(tmp_path):
    """The figures are kept, in the folders of the runs too, and a tuned model knows its whole line."""
    words = [sys.executable, str(SCRIPT), "--until=sft", "--count=10", *SHORT]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "runs" / "assistant.json").read_text())
    figures = {name: one["figures"] for name, one in kept.items()}
    assert list(figures) == ["data", "base", "sft"]
    measured = ["exact", "second exact", "right", "full sentences", "sampled exact", "text loss"]
    assert list(figures["base"]) == measured and list(figures["sft"]) == [*measured, "text loss before"]
    assert figures["sft"]["text loss before"] == figures["base"]["text loss"] != figures["sft"]["text loss"]
    for name in ("base", "sft"):
        assert f"{name}: exact {figures[name]['exact']}, " in done.stdout
    run = tmp_path / "runs" / "toy-sft"
    manifest = json.loads((run / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert [one["name"] for one in manifest["ancestors"]] == ["toy-base"]
    scores = json.loads((run / "evaluations" / "step_00000002" / "toy.json").read_text())["scores"]
    assert [score["metric"] for score in scores] == measured
