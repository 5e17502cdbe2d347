"""Jobs on a real Slurm: two nodes, a rank on each; the oracle is the same run on this machine that nothing disturbed."""

from __future__ import annotations

from commands import events, final_files, same
from jobs_on_slurm import Job


def test_a_job_on_two_nodes_is_the_run_on_one(cluster, workplace, expected):
    job = Job(cluster, workplace, "nodes")
    assert job.wait() == "COMPLETED", job.log
    same(job.metrics, expected)
    assert final_files(workplace, "nodes") == final_files(workplace, "expected")


def test_usr1_saves_and_requeues_and_no_step_is_lost(cluster, workplace, expected):
    job = Job(cluster, workplace, "warned")
    job.wait_for_step(7)
    job.send("USR1")
    assert job.wait() == "COMPLETED", job.log
    assert cluster.job(job.number)["Restarts"] == "1" and "requeued" in job.log
    same(job.metrics, expected)
    (stop,) = events(workplace, "warned", "stop")
    (resumed,) = events(workplace, "warned", "resume")
    assert resumed["step"] == stop["step"] >= 7
