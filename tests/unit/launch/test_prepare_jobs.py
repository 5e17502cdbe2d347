"""The jobs that a divided preparation submits, and how slurm/prepare.sbatch handles exit codes; no Slurm needed."""

import os
import subprocess
from pathlib import Path

import pytest

from megatrain import cli

SCRIPT = Path(__file__).parents[3] / "slurm" / "prepare.sbatch"


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Install an sbatch that numbers its jobs, a squeue and a scancel; return the file with their calls."""
    programs = {
        "sbatch": f'echo "$MEGATRAIN_MAX_FAULTS|$@" >>{tmp_path}/called; [ ! -e {tmp_path}/refuses ] || '
        f'[ $(wc -l <{tmp_path}/called) -lt 3 ] || {{ echo "sbatch: error: no such partition" >&2; exit 1; }}; '
        f"expr 40 + $(wc -l <{tmp_path}/called)",
        "squeue": f"cat {tmp_path}/queue 2>/dev/null",
        "scancel": f'echo "scancel $@" >>{tmp_path}/called',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "here" / "in").mkdir(parents=True)
    for number in range(9):
        (tmp_path / "here" / "in" / f"{number}.txt").write_text(
            f"text {number} of a small corpus with some words\n" * 9
        )
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "called"


WORDS = ["prepare", "data=files", "data.name=d", "data.paths=[in]", "launch=slurm"]


def calls(path):
    return [line.partition("|")[2] for line in path.read_text().splitlines()]


def comment_of(call):
    return next(word for word in call.split() if word.startswith("--comment="))


def test_each_stage_is_a_job_after_the_one_before_and_tasks_are_an_array(called, capsys):
    words = ["launch.tasks=8", "launch.time=60", "launch.max_requeues=3", "seed=5"]
    assert cli.main([*WORDS, *words, "--debug"]) == 0
    listed = "41  prepare-d-clean\n42  prepare-d-select\n43  prepare-d-encode\n44  prepare-d-publish\n"
    assert capsys.readouterr().out == listed
    clean, select, encode, publish = calls(called)
    own = "--debug data=files data.name=d data.paths=[in] seed=5"
    assert clean.replace(f" {comment_of(clean)}", "") == (
        f"--parsable --ntasks=1 --array=0-7 --job-name=prepare-d-clean --time=60 {SCRIPT} {own} "
        "launch.tasks=8 launch.stage=clean"
    ).replace(str(SCRIPT), clean.split()[6])
    assert clean.split()[6].endswith("slurm/prepare.sbatch")
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    for call, before in ((select, 41), (encode, 42), (publish, 43)):
        assert after.format(before) in call
    assert "--array=0-7" in encode and encode.endswith(f"{own} launch.tasks=8 launch.stage=encode")
    assert select.endswith(f"{own} launch.stage=select") and publish.endswith(f"{own} launch.stage=publish")
    assert "--array" not in select + publish
    assert called.read_text().startswith("3|"), "launch.max_requeues"


@pytest.mark.parametrize(
    ("words", "stages"), [([], ["all"]), (["launch.tasks=2", "data.max_documents=9"], ["select", "encode", "publish"])]
)
def test_work_that_is_not_divided_has_no_array(called, capsys, words, stages):
    assert cli.main([*WORDS, *words]) == 0
    assert [line.rpartition("-")[2] for line in capsys.readouterr().out.splitlines()] == stages
    assert "--dependency" not in calls(called)[0]


def test_a_dry_run_prints_a_script_that_submits_the_same_jobs(called, capsys):
    assert cli.main([*WORDS, "launch.tasks=4"]) == 0
    expected = called.read_text()
    called.unlink()
    capsys.readouterr()
    assert cli.main([*WORDS, "launch.tasks=4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# dry run: nothing was submitted\n") and not called.exists()
    assert "# job prepare-d-clean: 4 tasks, a job array\n# job prepare-d-select: 1 task\n" in shown
    subprocess.run(["sh", "-ec", shown], check=True)
    assert called.read_text() == expected


def test_jobs_in_the_queue_and_a_finished_dataset_are_not_submitted_again(called, capsys):
    (called.parent / "queue").write_text(f"7_[1-3]|{os.getcwd()}||prepare-d-clean\n9|/elsewhere||prepare-d-select\n")
    assert cli.main([*WORDS, "launch.tasks=4"]) == 0
    assert capsys.readouterr().out == "7  prepare-d-clean (in the queue already)\n" and not called.exists()
    (called.parent / "queue").unlink()
    here = [*WORDS[:-1], "tokenizer.vocab_size=300", "data.workers=1"]
    assert cli.main(here) == 0
    assert cli.main([*here, "launch=slurm", "launch.tasks=2"]) == 0
    assert "already prepared" in capsys.readouterr().err and not called.exists()


def test_jobs_in_the_queue_are_those_of_the_same_folder_and_settings(called, capsys):
    assert cli.main([*WORDS, "launch.tasks=2", "seed=5"]) == 0
    comments = [comment_of(call) for call in calls(called)]
    assert len(set(comments)) == 1
    comment = comments[0].removeprefix("--comment=")
    lines = [f"41_[0-1]|{os.getcwd()}|{comment}|prepare-d-clean", f"42|{os.getcwd()}|{comment}|prepare-d-select"]
    (called.parent / "queue").write_text("\n".join(lines) + "\n")
    called.unlink()
    capsys.readouterr()
    for words in (["launch.tasks=2"], ["launch.tasks=7", "launch.time=60", "data.workers=3"], []):
        assert cli.main([*WORDS, "seed=5", *words]) == 0
        shown = capsys.readouterr().out
        assert shown.splitlines() == [
            f"{n}  prepare-d-{s} (in the queue already)" for n, s in ((41, "clean"), (42, "select"))
        ]
    for words in (["launch.tasks=2"], ["seed=5", "launch.tasks=2", "data.heldout_fraction=0.3"], ["seed=6"]):
        assert cli.main([*WORDS, *words]) == 2
        said = capsys.readouterr().err
        assert "data.name=d: jobs that prepare data/d with other settings are in the queue (41 42)" in said
        assert "scancel 41 42" in said and not called.exists()
    assert cli.main([*WORDS, "seed=6", "data.dir=other", "launch.tasks=2"]) == 0
    assert "in the queue" not in capsys.readouterr().out and len(calls(called)) == 4, "another dataset of that name"


def test_if_slurm_refuses_a_stage_those_before_it_are_cancelled(called, capsys):
    (called.parent / "refuses").touch()
    assert cli.main([*WORDS, "launch.tasks=4"]) == 2
    shown = capsys.readouterr()
    assert "no such partition" in shown.err and not shown.out
    assert called.read_text().splitlines()[-1] == "scancel 41 42"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["launch.tasks=3"], "add launch=slurm; on this machine data.workers processes share it"),
        (["launch.stage=clean", "launch.tasks=3"], "start it with each of launch.task=0 to launch.task=2"),
        (["launch.stage=encode", "launch.tasks=3", "launch.task=3"], "it is 0 to 2"),
        (["launch.task=1"], "launch.task=1 is a task's share of launch.stage=clean or encode"),
        (["launch=slurm", "launch.stage=select"], "leave out launch=slurm"),
        (
            ["data=megatron", "data.name=m", "data.paths=[x]", "launch=slurm", "launch.tasks=2"],
            "too little to do to be divided",
        ),
        (["launch.stage=clean", "launch.tasks=2", "launch.task=0", "data.max_documents=5"], "launch.stage=select then"),
        (["launch=slurm", "launch.time=soon"], "launch.time='soon'"),
        (["launch=slurm", "launch.sbatch_options=[qos]"], "'qos' does not begin with -"),
        (["data=files", "data.name=x", "data.paths=[none/*.txt]", "launch=slurm"], "none/*.txt"),
        (["--dry-run"], "use it with launch=slurm"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(called, capsys, words, says):
    assert cli.main(["prepare", *words]) == 2
    assert says in capsys.readouterr().err and not called.exists()
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------------- the script


def start(folder, code, **environ):
    """Run the script with a python that ends with `code`; return its exit code and what it says."""
    (folder / "python").write_text(f'#!/bin/sh\necho "$@" >{folder}/call\nexit {code}\n')
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{folder}/requeues\n')
    (folder / "srun").write_text(f'#!/bin/sh\necho "$@" >{folder}/srun_call\nshift 3; exec "$@"\n')
    for name in ("python", "scontrol", "srun"):
        (folder / name).chmod(0o755)
    clear = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGATRAIN_"))}
    environ = {**clear, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", **environ}
    done = subprocess.run(["bash", SCRIPT, "data=files"], env=environ, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stderr


def requeues(folder):
    return (folder / "requeues").read_text() if (folder / "requeues").exists() else ""


@pytest.mark.parametrize("code", [0, 1, 2, 3, 7, 130 - 2])
def test_success_and_mistakes_are_not_started_again(tmp_path, code):
    found, said = start(tmp_path, code)
    assert found == code and f"exit code {code}" in said and not requeues(tmp_path)


@pytest.mark.parametrize("code", [8, 137])
def test_a_fault_starts_the_task_alone_again_as_often_as_asked(tmp_path, code):
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "MEGATRAIN_MAX_FAULTS": "2"}
    found, said = start(tmp_path, code, **array)
    assert found == code and "; requeued" in said
    assert requeues(tmp_path) == "requeue 12_5\n", "12 alone would be every task of the array"
    assert start(tmp_path, code, SLURM_RESTART_COUNT="1", **array)[0] == code
    found, said = start(tmp_path, code, SLURM_RESTART_COUNT="2", **array)
    assert found == code and "started again 2 times already (launch.max_requeues)" in said
    assert requeues(tmp_path).count("requeue") == 2


def test_a_task_gets_its_number_and_the_profiles_wrapper_and_container(tmp_path):
    start(tmp_path, 0, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="5")
    assert (tmp_path / "call").read_text().endswith("prepare data=files launch.task=5\n")
    start(tmp_path, 0)
    assert (tmp_path / "call").read_text().endswith("prepare data=files\n") and not (tmp_path / "srun_call").exists()
    (tmp_path / "site.sh").write_text("SRUN_OPTIONS=(--container)\nWRAPPER=(env A=1)\n")
    assert start(tmp_path, 0, MEGATRAIN_PROFILE=str(tmp_path / "site.sh"))[0] == 0
    assert (tmp_path / "srun_call").read_text().startswith("--ntasks=1 --cpu-bind=none --container env A=1 python -c")
    assert start(tmp_path, 0, MEGATRAIN_PROFILE="none")[0] == 2
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and "launch=slurm launch.tasks=N" in done.stderr
