"""How slurm/train.sbatch handles exit codes, with a fake srun and scontrol."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "slurm" / "train.sbatch"
GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "slurm.md"


def start(folder, code, facts="", excluded="(null)", **environ):
    """Start a job whose srun ends with `code`; return its exit code and the content of its output file.

    `facts` is what the run answers before a requeue, and `excluded` the job's own list of nodes to leave out. `srun
    --container` stands for a container: without it, `python` is not found where MEGATRAIN_PYTHON=in_the_image.
    """
    out = folder / "job.out"
    job = f"JobId=1 JobState=RUNNING StdOut={out} ExcNodeList={excluded}"
    kept = f'*update*) echo "$*" >> {folder}/updates ;; requeue*) echo "$*" >> {folder}/requeues ;;'
    answers = f'case "$*" in *show*job*) echo "{job}" ;; {kept} esac'
    asked = f'[ "$1 $5" = "--overlap --container" ] && echo "{facts}"'
    ran = f'trap "" USR1; echo "$*" > {folder}/call; env > {folder}/environment; exit {code}'
    srun = f'case "$*" in *requeue*) {asked} ;; *) {ran} ;; esac'
    for name, body in {"srun": srun, "scontrol": answers, "python": f'echo "{facts}"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "MASTER_ADDR": "n1"}
    with out.open("ab") as file:
        path = {"PATH": f"{folder}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", SCRIPT], env={**os.environ, **path, **slurm, **environ}, stderr=file)
    return done.returncode, out.read_text()


@pytest.mark.parametrize("code", [8, 137, 139])
def test_a_fault_that_returns_at_every_start_is_not_requeued_forever(code, tmp_path):
    for number in (1, 2):
        found, log = start(tmp_path, code, MEGATRAIN_MAX_FAULTS="2")
        assert found == code and log.count("; requeued") == number
    found, log = start(tmp_path, code, MEGATRAIN_MAX_FAULTS="2")
    assert found == code and log.count("; requeued") == 2 and "as in the 2 starts before" in log


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 7, 75])
def test_a_failure_that_a_restart_cannot_fix_is_not_requeued(code, tmp_path):
    found, log = start(tmp_path, code)
    assert found == code and "requeued" not in log and f"exit code {code}" in log


def test_a_task_of_an_array_is_requeued_alone(tmp_path):
    """The number of one of the tasks is that of the whole array."""
    found, log = start(tmp_path, 8, SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID="3")
    assert found == 8 and "; requeued" in log
    assert (tmp_path / "requeues").read_text() == "requeue 1_3\n"


def test_the_script_without_slurm_says_how_to_submit_it():
    done = subprocess.run(["bash", SCRIPT, "model=tiny"], capture_output=True, text=True)
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr and len(done.stderr.splitlines()) == 1


def test_starts_count_until_one_finishes_a_new_step_however_long_they_took(tmp_path):
    """Only the furthest step matters; the limit is the run's `launch.max_requeues`."""
    for step in (0, 0, 7, 7):
        found, log = start(tmp_path, 8, f"step={step} limit=2 exclude=")
        assert found == 8 and log.splitlines()[-1].endswith(f"at step {step}: a fault of the machines; requeued")
    found, log = start(tmp_path, 8, "step=7 limit=2 exclude=")
    assert "as in the 2 starts before, none of which finished a new step (launch.max_requeues)" in log
    assert log.count("; requeued") == 4


def test_a_start_that_saved_in_time_ends_the_count(tmp_path):
    for code in (8, 75, 8, 137):
        start(tmp_path, code, "step=3 limit=1 exclude=")
    _, log = start(tmp_path, 8, "step=3 limit=2 exclude=")
    assert log.count("; requeued") == 2 and "not requeued" in log


def test_a_save_before_the_time_limit_is_requeued_and_names_no_step(tmp_path):
    """The step is asked for after a fault alone."""
    found, log = start(tmp_path, "$(kill -USR1 $PPID; sleep 1; echo 75)", "step=3 limit=10 exclude=")
    assert found == 75 and re.search(r"exit code 75 after \d+ s: saved before the time limit; requeued\n$", log), log


@pytest.mark.parametrize(("own", "all_of_them"), [("(null)", "n3,n7"), ("n1", "n1,n3,n7")])
def test_nodes_that_failed_twice_are_left_out_of_the_next_start(own, all_of_them, tmp_path):
    _, log = start(tmp_path, 8, "step=3 limit=10 exclude=n3,n7", excluded=own)
    assert (tmp_path / "updates").read_text() == f"update JobId=1 ExcNodeList={all_of_them}\n"
    assert f"nodes left out from now on: {all_of_them}" in log


def test_the_run_is_asked_inside_of_the_container_that_srun_starts(tmp_path):
    """There is no megatrain outside of it: without an answer every start would count, and no node be left out."""
    profile = tmp_path / "site.sh"
    profile.write_text("MEGATRAIN_PYTHON=in_the_image\nSRUN_OPTIONS=(--container)\n")
    _, log = start(tmp_path, 8, "step=3 limit=10 exclude=n3", MEGATRAIN_PROFILE=str(profile))
    assert "at step 3: a fault of the machines; requeued" in log
    assert (tmp_path / "updates").read_text() == "update JobId=1 ExcNodeList=n3\n"


@pytest.mark.parametrize(
    ("container", "before_python"),
    [("", ""), ("WRAPPER", "apptainer exec --nv "), ("SRUN_OPTIONS", "--container-image=")],
)
def test_the_profiles_of_the_guide_do_what_it_says(container, before_python, tmp_path):
    """Every variable that they set is one of sbatch's or one that the script reads, and reaches srun."""
    guide = GUIDE.read_text()
    (text,) = re.findall(r"^cat > \S+mysite.sh <<'EOF'\n(.*?)^EOF$", guide, re.MULTILINE | re.DOTALL)
    if container:
        (other,) = re.findall(rf"^MEGATRAIN_PYTHON=python .*\n{container}=.*\n", guide, re.MULTILINE)
        text, replaced = re.subn(r"^MEGATRAIN_PYTHON=.*\n", other, text, flags=re.MULTILINE)
        assert replaced == 1
    names = re.findall(r"^(?:export )?(\w+)=", text, re.MULTILINE)
    script = SCRIPT.read_text()
    assert len(names) >= 8 and all(name.startswith("SBATCH_") or name in script for name in names)
    profile = tmp_path / "mysite.sh"
    profile.write_text(text)
    found, log = start(tmp_path, 0, MEGATRAIN_PROFILE=str(profile))
    assert found == 0, log
    python = "python" if container else "/shared/gpt/venv/bin/python"
    assert re.search(rf" {before_python}.*{python} -c import", (tmp_path / "call").read_text())
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "NCCL_IB_HCA=mlx5", "HF_HUB_OFFLINE=1"} <= set(environment)
