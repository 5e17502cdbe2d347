"""Processes of megatrain's own: nothing is imported from the working directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatrain
from megatrain.distributed.python_process import python_command
from megatrain.launch.agent import Agent
from megatrain.launch.nodes import SingleNode
from megatrain.launch.rank_process import LINUX
from megatrain.launch.recovery import Recovery
from megatrain.resilience.owner import Ownership
from megatrain.resilience.watchdog import Limits

SBATCH = Path(megatrain.__file__).parent / "slurm" / "train.sbatch"
START, FACTS = (
    subprocess.run(["bash", "-c", f'{lines}; printf %s "${name}"'], capture_output=True, text=True).stdout
    for lines in [";".join(re.findall(r'^(?:start|facts)=".*"$', SBATCH.read_text(), re.MULTILINE))]
    for name in ("start", "facts")
)
COMMAND = [sys.executable, "-c", START]
"""The command as a Slurm job starts it."""


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A working directory with names of the standard library, of dependencies and of megatrain itself."""
    for name in ("json", "torch", "yaml", "signal", "hydra", "random", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "megatrain" / "launch").mkdir(parents=True)
    for folder in ("megatrain", "megatrain/launch"):
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def test_a_process_imports_the_parents_megatrain_and_nothing_from_the_working_directory(traps):
    for command in (python_command("megatrain"), COMMAND):
        done = subprocess.run([*command, "train", "--cfg"], capture_output=True, text=True)
        assert done.returncode == 0 and "num_layers" in done.stdout, done.stderr


def test_a_slurm_job_asks_for_the_facts_of_a_run_folder_too(traps):
    run = traps / "runs" / "a=1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("launch: {max_requeues: 7}\nrun: {name: old}\n")
    (run / "events.jsonl").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", FACTS, "train", "--debug", "seed=3", "runs/a=1"], capture_output=True, text=True
    )
    assert done.stdout == "step=0 limit=7 exclude=\n", done.stderr


def test_a_process_that_runs_elsewhere_needs_no_installed_megatrain(traps):
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", *python_command("megatrain", "--version")[1:]],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert done.stdout == f"megatrain {megatrain.__version__}\n", done.stderr


@pytest.mark.skipif(not LINUX, reason="forks ranks on Linux only")
def test_forked_and_started_ranks_are_safe_too(traps):
    run = traps / "run"
    run.mkdir()
    for modules in ([], ["megatrain.cli"]):
        recovery = Recovery(run, Ownership.take(run), 0, 0, Limits(60, 60), modules=modules)
        agent = Agent(python_command("megatrain", "--version"), 1, run, recovery, SingleNode())
        try:
            agent.run()  # its outcome is a failure, as this rank trains nothing
            assert [worker.code for worker in agent.workers] == [0]
        finally:
            agent.close()
            recovery.owner.release()


def test_python_m_drops_the_working_directory_once_megatrain_is_imported(tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit('imported from the working directory')")
    done = subprocess.run([sys.executable, "-m", "megatrain", "train", "--cfg"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_removed_working_directory_is_a_message(tmp_path):
    gone = tmp_path / "gone"
    command = 'cd gone && rmdir "$PWD" && exec "$0" "$@"'
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", command, *COMMAND, "train", "--cfg"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("megatrain: error: the working directory"), done.stderr
    assert done.stderr.count("\n") == 1
