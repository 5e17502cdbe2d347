"""tools/bench/compare.py as a user calls it, with the peers that need no installation."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parents[2] / "tools" / "bench" / "compare.py"
SMALL = [
    "--pairs=2", "--steps=6", "--warmup=2", "--threads=1", "--batch=2", "--micro-batch=1", "--seq-len=16",
    "--device=cpu",
    "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn_size=32",
    "model.vocab_size=64", "tracking=none",
]  # fmt: skip


def compare(tmp_path, *words):
    command = [sys.executable, str(COMPARE), f"--json={tmp_path / 'out.json'}", *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)


def test_two_rounds_are_compared_with_the_bare_loop(tmp_path):
    """Turns alternate, the JSON has every figure, its ratios are those of the turns, and both train the same model."""
    done = compare(tmp_path, "--peers=bare-eager", "--markdown=-", *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert {
        "date",
        "command",
        "commit",
        "machine",
        "versions",
        "device",
        "threads",
        "job",
        "turns",
        "ratios",
    } <= result.keys()
    assert result["machine"]["cpu"] and result["machine"]["cores"] >= 1 and result["not_measured"] == {}
    turns = result["turns"]
    assert [(t["round"], t["contender"]) for t in turns] == [
        (n, c) for n in (1, 2) for c in ("megatrain", "bare-eager")
    ]
    for turn in turns:
        assert len(turn["step_times"]) == 6 and turn["step_s"] == statistics.median(turn["step_times"][2:])
        assert turn["tokens_per_s"] == pytest.approx(32 / turn["step_s"]) and turn["whole_step_s"] > 0
        assert turn["first_step_s"] > 0.3 and turn["peak_rss_bytes"] > 50 * 2**20 and turn["peak_device_bytes"] is None
        assert len(turn["losses"]) == 6 and turn["losses"][0] == pytest.approx(4.16, abs=0.1)
    for name in ("step_s", "whole_step_s"):
        found = result["ratios"]["bare-eager"][name]
        assert found["each"] == [turns[1][name] / turns[0][name], turns[3][name] / turns[2][name]]
        assert found["value"] == statistics.median(found["each"])
        assert [found["low"], found["high"]] == sorted(found["each"]) and found["coverage"] == 0.5
    assert done.stdout.count("| bare-eager |") == 2 and "commit" in done.stdout


def test_a_refused_key_and_an_unknown_peer_are_named(tmp_path):
    """A key that train refuses ends with 2 and train's message; an unknown peer with the list of peers."""
    done = compare(tmp_path, "--peers=bare-eager", *SMALL, "train.stepz=1")
    assert done.returncode == 2 and "train.stepz" in done.stderr and "train.steps" in done.stderr
    done = compare(tmp_path, "--peers=nanogpt")
    assert done.returncode == 2 and "nanogpt" in done.stderr and "huggingface" in done.stderr
