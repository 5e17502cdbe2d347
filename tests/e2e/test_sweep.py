"""Sweeps on this machine, as a user starts them: real runs, one after the other."""

from __future__ import annotations

import json
import signal
import time

import pytest
import yaml
from support.commands import TRAIN, events, megatrain, metrics, start

from megatrain.report.sweep_page import collect
from megatrain.resilience.owner import Ownership

SHORT = [*TRAIN, "engine=native", "train.steps=10", "train.eval_every=5"]
POINTS = ["model.num_layers=1,2", "optim.lr=1e-3,1e-2"]


@pytest.fixture
def folder(workplace, tmp_path):
    """Return a new folder with the shared dataset."""
    (tmp_path / "data").symlink_to(workplace / "data")
    return tmp_path


def test_a_failing_point_does_not_end_the_others_and_the_same_command_continues(folder):
    command = [*SHORT, "--multirun", *POINTS, "run.name=scan"]
    names = [f"scan-num_layers{layers}-lr{lr}" for layers in (1, 2) for lr in ("0.001", "0.01")]
    other_job = Ownership.take(folder / "runs" / names[1])
    done = megatrain(folder, *command)
    assert done.returncode == 7, done.stderr
    assert [f"== point {number} of 4: {name}" in done.stdout for number, name in enumerate(names, 1)] == [True] * 4
    assert "belongs to another job" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("scan-") and "belongs" not in line]
    assert [row[:2] for row in rows] == [[name, code] for name, code in zip(names, "0700", strict=True)]
    last = metrics(folder, names[3])[-1]
    assert rows[3][2:] == [f"{last['loss']:.4f}", f"{last['heldout_loss']:.4f}"] and rows[1][2:] == ["-", "-"]
    assert [len(metrics(folder, name)) for name in names] == [10, 0, 10, 10]

    other_job.release()
    begun = [(folder / "runs" / name / "events.jsonl").read_bytes() for name in (names[0], *names[2:])]
    done = megatrain(folder, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done already") == 3 and len(metrics(folder, names[1])) == 10
    assert [(folder / "runs" / name / "events.jsonl").read_bytes() for name in (names[0], *names[2:])] == begun

    for point, values in zip(names, [(1, 1e-3), (1, 1e-2), (2, 1e-3), (2, 1e-2)], strict=True):
        config = yaml.safe_load((folder / "runs" / point / "config.yaml").read_text())
        assert (config["model"]["num_layers"], config["optim"]["lr"], config["run"]["sweep"]) == (*values, "scan")
    record = json.loads((folder / "runs" / "scan" / "sweep.json").read_text())
    assert [point["run"] for point in record["points"]] == names

    reported = megatrain(folder, "report", "runs/scan")
    assert reported.returncode == 0 and reported.stdout == "runs/scan/report.html\n", reported.stderr
    points = collect(folder / "runs" / "scan")["points"]
    assert [point["status"]["text"] for point in points] == ["done"] * 4
    assert [point["values"] for point in points] == [["1", "0.001"], ["1", "0.01"], ["2", "0.001"], ["2", "0.01"]]


def until_step(process, folder, name, step):
    """Wait until a run has recorded this step."""
    deadline = time.monotonic() + 120
    while len(metrics(folder, name)) < step:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_killed_or_stopped_sweep_ends_its_point_and_the_same_command_continues(folder):
    command = [*SHORT, "train.steps=200", "train.eval_every=0", "-m", "seed=1,2", "run.name=stops"]
    process = start(folder, *command)
    until_step(process, folder, "stops-seed1", 7)
    process.kill()
    process.communicate(timeout=60)  # until no process holds its output
    killed_at = len(metrics(folder, "stops-seed1"))
    assert killed_at < 200
    Ownership.take(folder / "runs" / "stops-seed1").release()  # as if its owner had ended

    process = start(folder, *command)
    until_step(process, folder, "stops-seed1", killed_at + 7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    (stop,) = events(folder, "stops-seed1", "stop")
    assert stop["status"] == "stopped" and killed_at < stop["step"] < 200
    assert not (folder / "runs" / "stops-seed2").exists() and "not run" in out.splitlines()[-3]

    done = megatrain(folder, *command)
    assert done.returncode == 0, done.stderr
    assert events(folder, "stops-seed1", "resume")[-1]["step"] == stop["step"]
    for seed in (1, 2):
        assert [record["step"] for record in metrics(folder, f"stops-seed{seed}")] == list(range(1, 201))
