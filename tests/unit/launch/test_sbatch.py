"""How slurm/train.sbatch handles exit codes, with a fake srun and scontrol."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "slurm" / "train.sbatch"


def start(folder, code, **environ):
    """Start a job whose srun ends with `code`; return its exit code and the content of its output file."""
    out = folder / "job.out"
    for name, body in {
        "srun": f"exit {code}",
        "scontrol": f'case "$*" in *show*job*) echo "JobId=1 JobState=RUNNING StdOut={out}" ;; *requeue*) true ;; esac',
    }.items():
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
