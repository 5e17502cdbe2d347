"""`megatrain.train`, `Run` and `load`, as a notebook uses them; the cells of the guide run as printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from support.commands import TRAIN, events, metrics

import megatrain
from megatrain.errors import EXIT_BAD_CHECKPOINT, CheckpointError, ConfigError

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "python.md"
JOB = [*TRAIN[1:], "engine=native"]


@pytest.fixture
def here(workplace, monkeypatch):
    """Return the folder of the small dataset, as the working directory."""
    monkeypatch.chdir(workplace)
    return workplace


def script(folder, source, **streams):
    """Start a Python script of the user's, in a session of its own, as a notebook's kernel is."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=folder,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        **streams,
    )


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_guide_runs_as_printed(tmp_path):
    cells = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(cells) == 5
    process = script(tmp_path, "\n".join(cells))
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "optim.lr" in printed, "the refusal of learning_rate names the key that was meant"
    assert "torch.Size([1, " in printed
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_train_returns_the_run_and_continues_it(here, capfd):
    run = megatrain.train([*JOB, "run.name=by_python", "train.steps=6", "checkpoint.every=3"])
    assert run.path == here / "runs" / "by_python"
    assert list(run.metrics.index) == [1, 2, 3, 4, 5, 6]
    assert list(run.metrics["loss"]) == [record["loss"] for record in metrics(here, "by_python")]
    assert list(run.checkpoints.index) == [3, 6]
    assert (run.checkpoints["engine"] == "native").all()
    assert run.events["kind"].iloc[0] == "start"
    assert "step 6/6" in capfd.readouterr().out.replace("step      6", "step 6")
    again = megatrain.train(["runs/by_python", "train.steps=8"], quiet=True)
    assert list(again.metrics.index) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert capfd.readouterr().out == ""


def test_a_failure_raises_the_error_of_its_exit_code(here):
    megatrain.train([*JOB, "run.name=emptied", "train.steps=4"], quiet=True)
    for folder in Path("runs/emptied/checkpoints").iterdir():
        folder.rename(here / f"moved_{folder.name}")
    with pytest.raises(CheckpointError, match="all of them were moved or deleted") as caught:
        megatrain.train([*JOB, "run.name=emptied", "train.steps=4"], quiet=True)
    assert caught.value.exit_code == EXIT_BAD_CHECKPOINT
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=tiny data=files", r"train\(\['model=tiny', 'data=files'\]\)"),
        (["--multirun", "optim.lr=1,2"], "--multirun"),
        ([*JOB, "launch=slurm"], r"megatrain\.Run"),
        ([*JOB, "learning_rate=1"], r"optim\.lr"),
    ],
)
def test_what_train_does_not_take_is_refused_before_a_process_starts(here, monkeypatch, overrides, message):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=message):
        megatrain.train(overrides)


LONG = f"""
    import megatrain
    megatrain.train({[*JOB, "train.steps=100000", "checkpoint.every=0"]!r} + ["run.name=NAME"])
"""


def test_an_interrupt_saves_and_then_raises(here):
    process = script(here, LONG.replace("NAME", "interrupted"))
    wait_for(lambda: len(metrics(here, "interrupted")) > 3, "the job does not train")
    os.killpg(process.pid, signal.SIGINT)  # Jupyter interrupts the kernel's group
    _, error = process.communicate(timeout=120)
    assert error.rstrip().endswith("KeyboardInterrupt")
    (stop,) = events(here, "interrupted", "stop")
    assert stop["status"] == "stopped"
    assert list(megatrain.Run("runs/interrupted").checkpoints.index) == [stop["step"]]


def test_the_run_saves_when_the_notebook_is_killed(here):
    process = script(here, LONG.replace("NAME", "orphan"))
    wait_for(lambda: len(metrics(here, "orphan")) > 3, "the job does not train")
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: events(here, "orphan", "stop"), "the job goes on without its notebook")
    (stop,) = events(here, "orphan", "stop")
    assert list(megatrain.Run("runs/orphan").checkpoints.index) == [stop["step"]]


def test_load_gives_the_model_its_tokenizer_and_its_config(here):
    run = megatrain.train([*JOB, "run.name=loaded", "train.steps=4", "checkpoint.every=2"], quiet=True)
    model, tokenizer, config = run.load(step=2)
    assert config.hidden_size == 32 and tokenizer.decode(tokenizer.encode("import os")) == "import os"
    newest = megatrain.load("runs/loaded/checkpoints/step_00000004")
    assert any((a != b).any() for a, b in zip(model.parameters(), newest.model.parameters(), strict=True))
    options = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3}
    printed = subprocess.run(
        [sys.executable, "-m", "megatrain", "generate", "runs/loaded", "prompt=import ",
         *(f"{name}={value}" for name, value in options.items())],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "import " + newest.generate("import ", **options) == printed.removesuffix("\n")
    with pytest.raises(ConfigError, match=r"temperature=-1"):
        newest.generate(temperature=-1)
    assert newest.generate(
        "import ", max_new_tokens=np.int64(12), temperature=0.7, seed=np.int64(3)
    ) == newest.generate("import ", **options)
    for wrong in ({"seed": 1.5}, {"top_k": True}, {"temperature": None}, {"max_tokens": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            newest.generate("import ", **wrong)
    with pytest.raises(ConfigError, match="prompt: give text, not int"):
        newest.generate(3)
    assert run.load(step=np.int64(2)).config == config
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 \(there are: 2, 4\)"):
        run.load(step=3)
    with pytest.raises(ConfigError, match="device=gpu"):
        megatrain.load("runs/loaded", device="gpu")
