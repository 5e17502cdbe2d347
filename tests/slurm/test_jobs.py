"""Jobs on a real Slurm: two nodes, one rank on each; the oracle is the same run on this machine, undisturbed."""

from __future__ import annotations

import re
import sqlite3
import sys
from contextlib import closing

import pytest
from support.cluster import wait_until
from support.commands import events, final_files, megatrain, metrics, same
from support.faults import fault, injected
from support.jobs_on_slurm import JOB, SCRIPT, Job


def test_a_submitted_job_gives_the_records_of_a_local_run(cluster, workplace, expected):
    out = workplace / "nodes.out"
    words = ["launch=slurm", "launch.num_nodes=2", "launch.time=20", f"launch.sbatch_options=['--output={out}']"]
    asked = [*JOB, "run.name=nodes", *words]
    environ = {"SLURM_CONF": cluster.environ["SLURM_CONF"]}
    shown = megatrain(workplace, *asked, "--dry-run", environ=environ)
    assert shown.returncode == 0 and "sbatch --parsable --nodes=2" in shown.stdout
    done = megatrain(workplace, *asked, environ=environ)
    assert done.returncode == 0 and done.stdout.strip().isdecimal(), done.stderr
    job = Job(cluster, workplace, "nodes", number=done.stdout.strip())
    assert job.wait() == "COMPLETED", job.log
    assert "TimeLimit=00:20:00" in cluster.command("scontrol", "show", "job", job.number)
    same(job.metrics, expected)
    assert final_files(workplace, "nodes") == final_files(workplace, "expected")


def test_a_mistake_ends_the_job_with_its_code_and_is_reported_once(cluster, workplace):
    job = Job(cluster, workplace, "mistake", "data.name=none_such")
    assert job.wait() == "FAILED", job.log
    found = cluster.job(job.number)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0"), job.log
    assert job.log.count("there is no dataset at") == 1 and "error: n1: data.name=none_such" in job.log
    wrong = Job(cluster, workplace, "nodes3", "launch.num_nodes=3")
    assert wrong.wait() == "FAILED" and cluster.job(wrong.number)["ExitCode"] == "2:0", wrong.log
    assert "launch.num_nodes=3, but Slurm gave this job step 2 nodes (n[1-2])" in wrong.log


def test_a_job_whose_machines_keep_failing_is_not_requeued_forever(cluster, workplace):
    job = Job(cluster, workplace, "no-gpu", "launch.device=cuda", faults={"MEGATRAIN_MAX_FAULTS": "1"})
    assert job.wait() == "FAILED", job.log
    found = cluster.job(job.number)
    assert (found["ExitCode"], found["Restarts"]) == ("8:0", "1"), job.log
    assert job.log.count("a fault of the machines; requeued") == 1 and "as in the 1 starts before" in job.log


def test_slurm_accepts_the_options_of_the_example_profile(cluster, workplace):
    """Each of its commented lines is switched on, except those that name what this cluster does not have."""
    text = (SCRIPT.parent / "profiles" / "example.sh").read_text()
    chosen = re.findall(r"^# (export (SBATCH_\w+)=.*)", text, re.MULTILINE)
    absent = {"SBATCH_PARTITION", "SBATCH_GPUS_PER_NODE"}
    assert absent < {name for _, name in chosen}
    profile = workplace / "example.sh"
    profile.write_text("\n".join(line for line, name in chosen if name not in absent))
    submit = f"source {profile} && sbatch --parsable --output=/dev/null --wrap true"
    number = cluster.command("bash", "-c", submit, cwd=workplace).strip()
    found = cluster.job(number)
    assert (found["OverSubscribe"], found["TimeLimit"], found["Account"]) == ("NO", "1-00:00:00", "project123")
    Job(cluster, workplace, "example", number=number).wait()


def test_each_array_task_is_a_run_and_the_profile_sets_the_number_of_ranks(cluster, workplace):
    profile = workplace / "site.sh"
    profile.write_text(
        "export SBATCH_TIMELIMIT=7\nMEGATRAIN_RANKS_PER_NODE=2\nmegatrain_setup() { export OMP_NUM_THREADS=1; }\n"
        "WRAPPER=(env FROM_PROFILE=1)\n"
    )
    environ = {"MEGATRAIN_PROFILE": str(profile), "MEGATRAIN_PYTHON": sys.executable}
    options = ["--parsable", "--array=1-2", "--nodes=1", f"--output={workplace}/array-%a.out"]
    words = ["run.name=array-%a", "seed=%a", "train.steps=3", "train.eval_every=0"]
    sbatch = ["sbatch", *options, str(SCRIPT), *JOB[1:], *words]
    number = cluster.command(*sbatch, cwd=workplace, **environ).strip()
    for task in (1, 2):
        job = Job(cluster, workplace, f"array-{task}", number=f"{number}_{task}")
        assert job.wait() == "COMPLETED", job.log
        assert len(job.metrics) == 3 and "2 x cpu" in job.log, job.log
        assert f"\nseed: {task}\n" in (workplace / "runs" / f"array-{task}" / "config.yaml").read_text()


def test_each_point_of_a_sweep_is_a_job_under_one_mlflow_run(cluster, workplace):
    """Submitting again leaves queued points in the queue and finished points alone."""
    from mlflow.tracking import MlflowClient

    environ = {"SLURM_CONF": cluster.environ["SLURM_CONF"], "MLFLOW_TRACKING_URI": ""}
    options = f"launch.sbatch_options=['--output={workplace}/%x.out','--hold']"
    words = ["run.name=scan", "run.dir=sweeps", "seed=1,2", "launch=slurm", options, "tracking=mlflow"]
    command = [*JOB, "--multirun", *words]
    done = megatrain(workplace, *command, environ=environ)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for _, name in lines] == ["scan-seed1", "scan-seed2"]
    again = megatrain(workplace, *command, environ=environ)
    assert again.stdout == "".join(f"{number}  {name} (in the queue already)\n" for number, name in lines), again.stderr
    cluster.command("scontrol", "release", ",".join(number for number, _ in lines))
    for number, name in lines:
        job = Job(cluster, workplace, name, number=number)
        assert job.wait() == "COMPLETED", job.log
        assert [record["step"] for record in metrics(workplace, name, "sweeps")] == list(range(1, 41))
    again = megatrain(workplace, *command, environ=environ)
    assert again.stdout == "done  scan-seed1\ndone  scan-seed2\n", again.stderr
    client = MlflowClient(f"sqlite:///{workplace}/sweeps/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("megatrain").experiment_id])
    (parent,) = (run.info for run in runs if "mlflow.parentRunId" not in run.data.tags)
    under = sorted(run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.run_id)
    assert parent.run_name == "scan" and under == ["scan-seed1", "scan-seed2"] and len(runs) == 3


def test_usr1_saves_and_requeues_and_no_step_is_lost(cluster, workplace, expected):
    job = Job(cluster, workplace, "warned", "tracking=mlflow")
    job.wait_for_step(7)
    job.send("USR1")
    assert job.wait() == "COMPLETED", job.log
    assert cluster.job(job.number)["Restarts"] == "1" and "requeued" in job.log
    same(job.metrics, expected)
    stop, _ = events(workplace, "warned", "stop")
    (resumed,) = events(workplace, "warned", "resume")
    assert resumed["step"] == stop["step"] >= 7
    with closing(sqlite3.connect(workplace / "runs" / "mlflow.db")) as store:
        assert store.execute("select count(*) from runs").fetchall() == [(1,)], "one MLflow run"
        logged = store.execute("select step from metrics where key = 'loss' order by step").fetchall()
    assert logged == [(step,) for step in range(1, 41)], "every step once"


def test_an_operators_requeue_continues_the_run_and_scancel_ends_it(cluster, workplace, expected):
    job = Job(cluster, workplace, "again")
    job.wait_for_step(7)
    cluster.command("scontrol", "requeue", job.number)
    job.wait_for_step(20)
    same(job.metrics[:20], expected[:20])
    assert cluster.job(job.number)["Restarts"] == "1"
    cluster.command("scancel", job.number)
    assert job.wait() == "CANCELLED", job.log
    cluster.wait_idle()
    assert (job.state, cluster.job(job.number)["Restarts"]) == ("CANCELLED", "1"), job.log
    saved, last = events(workplace, "again", "stop")[-1]["step"], job.metrics[-1]["step"]
    assert saved == last < 40, "scancel's TERM saves, too"
    same(job.metrics, expected[:last])


def test_a_rank_killed_on_one_node_restarts_all_ranks_inside_the_job(cluster, workplace, expected):
    deaths = [fault(1, 8, "backward", "SIGKILL"), fault(0, 23, "forward", "SIGKILL")]
    copies = ["checkpoint.every=1000", "checkpoint.memory_every=2"]  # each node's ranks continue from its own memory
    job = Job(cluster, workplace, "rank-killed", *copies, faults=injected(workplace, "rank-killed", deaths))
    assert job.wait() == "COMPLETED", job.log
    assert cluster.job(job.number)["Restarts"] == "0"
    same(job.metrics, expected)
    assert final_files(workplace, "rank-killed") == final_files(workplace, "expected")
    failures = events(workplace, "rank-killed", "failure")
    assert [(f["rank"], f["step"], f["host"]) for f in failures] == [(1, 8, "n2"), (0, 23, "n1")]
    assert [event["restarts"] for event in events(workplace, "rank-killed", "restart")] == [1, 2]
    resumes = events(workplace, "rank-killed", "resume")
    assert [event["copy"] for event in resumes] == ["in memory"] * 2
    assert all(0 < at - event["step"] <= 4 for at, event in zip((8, 23), resumes, strict=True))


def test_a_node_whose_gpu_fails_twice_is_left_out_of_the_requeue(cluster, workplace, expected):
    """The first fault costs a restart inside the job; after the second the job goes on without that node."""
    error = "torch.AcceleratorError('CUDA error: uncorrectable ECC error encountered')"
    broken = [fault(1, step, "forward", "raise", by=error) for step in (8, 14)]
    job = Job(cluster, workplace, "bad-gpu", faults=injected(workplace, "bad-gpu", broken))
    assert job.wait() == "COMPLETED", job.log
    same(job.metrics, expected)
    assert [(f["host"], f["class"]) for f in events(workplace, "bad-gpu", "failure")] == [("n2", "machine")] * 2
    found = cluster.job(job.number)
    assert (found["Restarts"], found["ExcNodeList"]) == ("1", "n2"), job.log
    assert "n2" not in found["NodeList"], found["NodeList"]


def test_all_nodes_find_a_hang_on_one_node_and_name_the_culprit(cluster, workplace, expected):
    stopped = injected(workplace, "hangs", [fault(1, 8, "backward", "SIGSTOP")])
    job = Job(cluster, workplace, "hangs", "resilience.hang_timeout_s=10", faults=stopped)
    assert job.wait() == "COMPLETED", job.log
    same(job.metrics, expected)
    (failure,) = events(workplace, "hangs", "failure")
    assert (failure["how"], failure["rank"], failure["host"]) == ("hang", 1, "n2")
    assert {(e["rank"], e["host"], e["guilty"]) for e in events(workplace, "hangs", "hang")} == {
        (0, "n1", False),
        (1, "n2", True),
    }


@pytest.mark.parametrize(
    ("which", "saves"), [("n2", []), ("n1", ["checkpoint.every=1000", "checkpoint.memory_every=2"])]
)
def test_a_node_powered_off_is_requeued_and_never_reported_completed(cluster, workplace, expected, which, saves):
    """With copies in memory, the surviving node writes its own part and the lost node's to disk."""
    name = f"power-{which}"
    job = Job(cluster, workplace, name, *saves)
    job.wait_for_step(8)
    cluster.power_off(which)
    try:
        wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", 90, f"a requeue; {job.log}")
        done = job.metrics[-1]["step"]
        assert job.wait() == "COMPLETED", job.log
    finally:
        cluster.power_on(which)
        cluster.wait_idle()
    same(job.metrics, expected)
    (resumed,) = events(workplace, name, "resume")
    assert done - resumed["step"] <= 5, "more redone than a save apart"
    assert len(events(workplace, name, "rescue")) == bool(saves)
