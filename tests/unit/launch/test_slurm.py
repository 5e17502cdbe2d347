"""A node's place as read from srun's variables, and the command that submits a job; no Slurm needed."""

import os
import sys
from pathlib import Path

import pytest

from megatrain import cli
from megatrain.config import LaunchConfig
from megatrain.errors import ConfigError, DataError, EnvironmentFault
from megatrain.launch import slurm
from megatrain.launch.nodes import SingleNode
from megatrain.launch.slurm import Step, find_profile, num_nodes, sbatch_command, together
from megatrain.tracking.events import EventLog
from megatrain.tracking.sweep_record import SweepRecord

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NNODES": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[1-3]",
}


def test_a_task_of_srun_is_a_node_of_its_step():
    assert Step.from_environ(STEP) == Step("17.0.0", 1, 2, "n[1-2]")
    assert Step.from_environ({**STEP, "SLURM_RESTART_COUNT": "4"}).key == "17.0.4", (
        "a restart must not connect to agents of the previous start"
    )


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},
        {**STEP, "SLURM_PTY_PORT": "40000"},
    ],
    ids=["no Slurm", "batch script", "torchrun under srun", "srun --pty"],
)
def test_outside_srun_there_is_no_step(environ):
    assert Step.from_environ(environ) is None


def test_one_task_per_rank_is_refused_with_the_options_that_work():
    with pytest.raises(EnvironmentFault, match=r"8 tasks on 2 nodes.*--ntasks-per-node=1"):
        Step.from_environ({**STEP, "SLURM_STEP_NUM_TASKS": "8"})


def test_the_number_of_nodes_is_the_steps_and_any_other_is_refused():
    step = Step.from_environ(STEP)
    assert num_nodes(LaunchConfig(), None) == 1
    assert num_nodes(LaunchConfig(num_nodes=4), None) == 4
    assert num_nodes(LaunchConfig(), step) == num_nodes(LaunchConfig(num_nodes=2), step) == 2
    with pytest.raises(ConfigError, match=r"launch.num_nodes=4, but Slurm gave this job step 2 nodes \(n\[1-2\]\)"):
        num_nodes(LaunchConfig(num_nodes=4), step)


def test_the_head_is_the_first_node_or_the_one_the_site_sets(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames n[1-2]' ] && printf 'n1\\nn2\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Step("k", 0, 2, "n[1-2]").head() == "n1"
    assert Step("k", 0, 1, "n7").head() == "n7"
    scontrol.unlink()
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR="):
        Step("k", 0, 2, "n[1-2]").head()
    monkeypatch.setenv("MASTER_ADDR", "n1-ib")
    assert Step("k", 0, 2, "n[1-2]").head() == "n1-ib"


class Team(SingleNode):
    """Node 1 of two; the test sets what node 0 sends."""

    node, size = 1, 2

    def __init__(self, other):
        super().__init__()
        self.other = other

    def all_gather(self, value):
        return [self.other, value]


def test_a_failure_on_one_node_ends_all_nodes_alike():
    def refuse():
        raise DataError("no data")

    assert together(Team(None), lambda: 5) == 5
    with pytest.raises(DataError, match=f"^{os.uname().nodename}: no data"):
        together(Team(None), refuse)
    with pytest.raises(DataError, match=r"^no data"):
        together(SingleNode(), refuse)
    for act in (refuse, lambda: 5):  # node 0 reports why
        with pytest.raises(SystemExit) as ended:
            together(Team([7, "owned"]), act)
        assert ended.value.code == 7


def test_the_submission_command_has_every_option():
    config = LaunchConfig(name="slurm", num_nodes=4, partition="gpu", time="1:00:00", sbatch_options=["--qos=high"])
    words = ["model=tiny", "seed=2"]
    assert sbatch_command(config, "my run", Path("s/train.sbatch"), words, {"nodes": 4}) == [
        "sbatch", "--parsable", "--nodes=4", "--job-name=my run", "--partition=gpu", "--time=1:00:00", "--qos=high",
        "s/train.sbatch", "model=tiny", "seed=2",
    ]  # fmt: skip


def test_a_profile_is_a_path_or_a_name(tmp_path):
    (tmp_path / "site.sh").touch()
    assert find_profile(None, tmp_path) is None
    assert find_profile("site", tmp_path) == find_profile(str(tmp_path / "site.sh"), tmp_path) == tmp_path / "site.sh"
    with pytest.raises(ConfigError, match=r"launch.profile=sit is neither .*there: site\)"):
        find_profile("sit", tmp_path)
    (tmp_path / "broken.sh").write_text("this is ( broken\n")
    with pytest.raises(ConfigError, match=r"launch.profile=broken: bash cannot read it: .*syntax error"):
        find_profile("broken", tmp_path)


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """Install an sbatch that records its call and answers like Slurm; return a function that reads the record."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$SBATCH_PARTITION|$MEGATRAIN_PYTHON|$@" >{tmp_path}/called\necho "42;cluster"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path / "called"


def test_launch_slurm_submits_itself_and_prints_the_jobs_id(fake_sbatch, tmp_path, capsys, monkeypatch):
    (tmp_path / "site.sh").write_text("export SBATCH_PARTITION=gpu\n")
    words = ["model=tiny", "launch=slurm", "launch.num_nodes=2", f"launch.profile={tmp_path}/site.sh"]
    assert cli.main(["train", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    first, job, script, how, command = shown.splitlines()
    assert not fake_sbatch.exists() and first == "# dry run: nothing was submitted"
    size = "2 nodes with one rank for each GPU that Slurm gives, or 1 each without GPUs, launch.device=auto"
    assert job == f"# job tiny-python_stdlib: {size}"
    assert Path(script.removeprefix("# batch script: ")).read_text().startswith("#!") and "--dry-run" in how
    assert "--nodes=2" in command, "the command comes last"
    assert cli.main(["train", *words]) == 0
    assert capsys.readouterr().out == "42\n"
    partition, python, called = fake_sbatch.read_text().strip().split("|")
    assert (partition, python) == ("gpu", sys.executable)
    assert called.startswith("--parsable --nodes=2 --job-name=tiny-") and called.endswith(" ".join(words))


@pytest.mark.parametrize(
    ("nodes", "ranks", "size"),
    [
        (1, 1, "1 node with 1 rank"),
        (1, 8, "1 node with 8 ranks"),
        (2, 1, "2 nodes with 1 rank each (2 in all)"),
        (2, 4, "2 nodes with 4 ranks each (8 in all)"),
    ],
)
def test_a_dry_run_says_how_large_the_job_is(nodes, ranks, size, fake_sbatch, capsys):
    words = [f"launch.num_nodes={nodes}", f"launch.nproc_per_node={ranks}", "train.micro_batch_size=1"]
    assert cli.main(["train", "model=tiny", "launch=slurm", *words, "--dry-run"]) == 0
    assert f"# job tiny-python_stdlib: {size}, launch.device=auto\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launch=slurm", "launch.num_nodes=2", "train.global_batch_size=1"], "train.global_batch_size=1"),
        (["launch.num_nodes=2"], "launch=slurm or sbatch slurm/train.sbatch"),
        (["--dry-run"], "--cfg shows the config"),
    ],
)
def test_a_job_that_cannot_run_is_not_submitted(words, says, fake_sbatch, capsys):
    assert cli.main(["train", "model=tiny", *words]) == 2
    assert says in capsys.readouterr().err and not fake_sbatch.exists()


def test_slurms_own_refusal_is_shown(fake_sbatch, tmp_path, capsys):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2; exit 1\n")
    assert cli.main(["train", "model=tiny", "launch=slurm", "launch.partition=x"]) == 2
    assert "invalid partition" in capsys.readouterr().err


SWEEP = ["train", "-m", "model=tiny", "launch=slurm", "seed=1,2,3", "run.name=scan"]


@pytest.fixture
def fake_cluster(fake_sbatch, tmp_path, monkeypatch):
    """Install an sbatch that numbers its jobs and a squeue that lists given jobs; return the test's empty folder."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/called\nexpr 40 + $(wc -l <{tmp_path}/called)\n'
    )
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\ncat {tmp_path}/queue 2>/dev/null\n")
    squeue.chmod(0o755)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_every_point_of_a_sweep_is_a_job_of_its_own(fake_cluster, capsys):
    assert cli.main([*SWEEP, "--debug"]) == 0
    assert capsys.readouterr().out == "41  scan-seed1\n42  scan-seed2\n43  scan-seed3\n"
    calls = (fake_cluster / "called").read_text().splitlines()
    assert [call.split()[2] for call in calls] == [f"--job-name=scan-seed{seed}" for seed in (1, 2, 3)]
    words = "--debug model=tiny launch=slurm seed=2 run.name=scan-seed2 run.sweep=scan"
    assert calls[1].endswith(f"train.sbatch {words}")
    record = SweepRecord.load(fake_cluster / "here" / "runs" / "scan")
    assert [point.run for point in record.points] == ["scan-seed1", "scan-seed2", "scan-seed3"]


def test_a_dry_run_of_a_sweep_shows_every_job_and_the_scripts_place_once(fake_cluster, capsys):
    assert cli.main([*SWEEP, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"--job-name=scan-seed{seed} ") for seed in (1, 2, 3)] == [1, 1, 1]
    assert shown.count("# batch script: ") == 1 and shown.startswith(
        "# dry run: nothing was submitted\n# job scan-seed1\n"
    )
    assert all(line.startswith(f"MEGATRAIN_PYTHON={sys.executable} sbatch ") for line in shown.splitlines()[-3:])
    assert not (fake_cluster / "called").exists() and not any((fake_cluster / "here").iterdir())


def test_points_that_are_done_or_queued_are_not_submitted_again(fake_cluster, capsys):
    here = fake_cluster / "here"
    (fake_cluster / "queue").write_text(f"17|{here}||scan-seed1\n18|/elsewhere||scan-seed2\n19|{here}|a|other\n")
    run_dir = here / "runs" / "scan-seed3"
    assert cli.main(["train", "model=tiny", "seed=3", "run.name=scan-seed3", "run.sweep=scan", "--cfg"]) == 0
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(capsys.readouterr().out.replace("vocab_size: null", "vocab_size: 400"))
    log = EventLog(run_dir / "events.jsonl")
    log.emit("start", 0)
    log.emit("stop", 100, status="done")
    assert cli.main(SWEEP) == 0
    assert capsys.readouterr().out == "17  scan-seed1 (in the queue already)\n41  scan-seed2\ndone  scan-seed3\n"
    for word in ("train.steps=101", "optim.lr=1"):  # a longer run; or a changed one, which the job itself will refuse
        assert cli.main([*SWEEP, word]) == 0
        assert "done" not in capsys.readouterr().out
    log.emit("resume", 100)  # as of a run that was made longer and then killed
    assert cli.main(SWEEP) == 0
    assert "done" not in capsys.readouterr().out


def test_slurms_refusal_of_a_point_names_it(fake_cluster, capsys):
    (fake_cluster / "sbatch").write_text(
        '#!/bin/sh\ncase "$*" in *seed=2*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;;'
        " *) echo 41; esac\n"
    )
    assert cli.main(SWEEP) == 2
    shown = capsys.readouterr()
    assert shown.out == "41  scan-seed1\n" and "point 2 of 3 (seed=2): launch=slurm: Slurm refused the job" in shown.err
    assert cli.main([*SWEEP, "launch.profile=none"]) == 2
    assert "point 1 of 3 (seed=1): launch.profile=none is neither" in capsys.readouterr().err


def test_the_script_is_found_wherever_megatrain_is_installed():
    from importlib import resources

    assert (resources.files("megatrain.slurm") / "train.sbatch").is_file() and slurm
