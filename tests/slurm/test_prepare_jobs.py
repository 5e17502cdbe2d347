"""A preparation divided among the tasks of Slurm arrays gives the bytes of a plain one, whatever befalls its tasks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from support.cluster import wait_until
from support.commands import megatrain
from support.jobs_on_slurm import ENDED

TASKS = 3

PYTHON = """
# Runs `python -c ...` with shards of 20,000 bytes, a pause for each, and a task that kills itself once.
import os, pathlib, signal, sys, time
from megatrain.data.corpus import cleaning, files_source, pipeline, shard
shard.SHARD_BYTES = files_source.SHARD_BYTES = 20_000
cleaned = 0
def slowly(task):
    global cleaned
    cleaned += 1
    folder = pathlib.Path(os.environ["SMALL_SHARDS"])
    with open(folder / "cleaned", "a") as file:
        file.write(os.environ.get("SLURM_ARRAY_TASK_ID", "-") + "\\n")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if cleaned == 2 and os.environ.get("DIES", "none") == os.environ.get("SLURM_ARRAY_TASK_ID"):
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    return cleaning.clean_chunk(task)
pipeline.clean_chunk = slowly
sys.argv = ["-c", *sys.argv[3:]]
exec(START)
"""

START = "import sys; sys.path[:] = filter(None, sys.path); from megatrain.cli import command; command()"


@pytest.fixture
def place(tmp_path):
    """Write a corpus and a profile under which jobs cut it into small shards; return the folder."""
    draws = random.Random(0)
    (tmp_path / "in").mkdir()
    texts = [" ".join(draws.choices(["to", "be", "or", "not", "that", "is", "question"], k=60)) for _ in range(1500)]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[:50]]]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "small_shards.py").write_text(PYTHON.replace("exec(START)", f"exec({START!r})"))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/small_shards.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "site.sh").write_text(f"MEGATRAIN_PYTHON={python}\n")
    return tmp_path


WORDS = ["prepare", "data=files", "data.name=d", "data.paths=[in]", "tokenizer.vocab_size=300", "data.workers=1"]
WORDS += ["data.write_text=true"]


def submit(cluster, place, **environ):
    """Submit the preparation and return the number of each stage's job."""
    options = f"['--output={place}/%x-%a.out','--exclusive']"
    words = ["launch=slurm", f"launch.tasks={TASKS}", "launch.profile=site.sh", f"launch.sbatch_options={options}"]
    environ = {"SLURM_CONF": cluster.environ["SLURM_CONF"], "SMALL_SHARDS": str(place), **environ}
    done = megatrain(place, *WORDS, *words, environ=environ)
    assert done.returncode == 0, done.stderr
    return {line.split()[1].removeprefix("prepare-d-"): line.split()[0] for line in done.stdout.splitlines()}


def wait(cluster, place, number, seconds=200):
    """Wait until a job has ended, and return its state."""
    wait_until(lambda: cluster.job(number)["JobState"] in ENDED, seconds, f"job {number}; {logs(place)}")
    return cluster.job(number)["JobState"]


def logs(place):
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(place.glob("*.out")))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain(place):
    """Prepare the same on this machine, alone, cut into the same shards."""
    command = [str(place / "python"), "-c", START, *WORDS, "data.dir=plain"]
    (place / "alone").mkdir()
    environ = {**os.environ, "SMALL_SHARDS": str(place / "alone")}
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return files_of(place / "plain" / "d")


def cleaned(place):
    return (place / "cleaned").read_text().split() if (place / "cleaned").exists() else []


def test_tasks_that_are_killed_stopped_or_lose_their_node_are_redone_alone(cluster, place):
    numbers = submit(cluster, place, PAUSE="0.5", DIES="1")
    assert list(numbers) == ["clean", "select", "encode", "publish"]
    again = submit(cluster, place)
    assert again == numbers, "they are in the queue already"
    wait_until(lambda: set(cleaned(place)) >= {"0", "1", "2"}, 60, f"all tasks at work; {logs(place)}")
    cluster.command("scancel", "--signal=USR1", "--batch", f"{numbers['clean']}_0")  # as before the time limit
    node = cluster.job(f"{numbers['clean']}_2")["NodeList"]
    cluster.power_off(node)
    try:
        assert wait(cluster, place, numbers["publish"]) == "COMPLETED", logs(place)
    finally:
        cluster.power_on(node)
        cluster.wait_idle()
    assert files_of(place / "data" / "d") == plain(place)
    assert [path.name for path in (place / "data").iterdir()] == ["d"]
    said = (place / "prepare-d-clean-1.out").read_text()
    assert said.count("exit code 137") == 1 and "; requeued" in said
    assert "USR1: the task ends" in (place / "prepare-d-clean-0.out").read_text()
    assert "start 2" in (place / "prepare-d-clean-2.out").read_text(), "its node was lost"


def test_a_task_with_bad_data_ends_the_chain_and_the_same_command_goes_on(cluster, place):
    (place / "in" / "b.jsonl").write_text("{\n")
    numbers = submit(cluster, place)
    assert wait(cluster, place, numbers["publish"]) == "CANCELLED", logs(place)
    assert "b.jsonl:1: not a line of JSON" in logs(place) and "requeued" not in logs(place)
    assert not (place / "data" / "d").exists()
    (place / "in" / "b.jsonl").unlink()
    before = len(cleaned(place))
    again = submit(cluster, place)
    assert wait(cluster, place, again["publish"]) == "COMPLETED", logs(place)
    assert len(cleaned(place)) - before <= 1, "parts that were finished are cleaned again"
    assert files_of(place / "data" / "d") == plain(place)
    assert submit(cluster, place) == {}, "it is prepared already"
