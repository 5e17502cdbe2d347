"""A preparation divided among the tasks of Slurm arrays: the jobs of its stages, each after the one before.

A job runs slurm/prepare.sbatch, which does one `launch.stage` of `megatrain prepare`. Imports no torch.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress

from megatrain.config import PrepareConfig
from megatrain.config.launch_config import STAGES
from megatrain.errors import EXIT_OK, MegatrainError
from megatrain.launch.slurm import Submission, jobs_here, show_dry_run

_DIVIDED = ("clean", "encode")
_NUMBER = "{before}"  # stands for the number of the job before


def submit(config: PrepareConfig, arguments: Sequence[str], dry_run: bool) -> int:
    """Submit the jobs of a preparation and print the number and stage of each; a dry run only prints them.

    `arguments` are those of `megatrain prepare`, without any of `launch=`. If its jobs are in the queue already, they
    are printed and none is submitted. Raises as `Submission.submit`; then none of the jobs is left in the queue.
    """
    stages = _stages(config)
    jobs = [_job(config, stage, arguments, first=stage == stages[0]) for stage in stages]
    if dry_run:
        show_dry_run(jobs[0].script, [f"job {job_name(config, stage)}: {_tasks(config, stage)}" for stage in stages])
        for stage, job in zip(stages, jobs, strict=True):
            print(_as_shell(stage, job, before=stages[stages.index(stage) - 1]))
        return EXIT_OK
    queued = jobs_here()
    if found := {stage: queued[name] for stage in stages if (name := job_name(config, stage)) in queued}:
        for stage, number in found.items():
            print(f"{number.partition('_')[0]}  {job_name(config, stage)} (in the queue already)")
        return EXIT_OK
    numbers: list[str] = []
    try:
        for job in jobs:
            numbers.append(_after(job, numbers[-1] if numbers else "").submit())
    except MegatrainError:
        if numbers:
            with suppress(OSError):
                subprocess.run(["scancel", *numbers], capture_output=True, check=False)
        raise
    for stage, number in zip(stages, numbers, strict=True):
        print(f"{number}  {job_name(config, stage)}")
    return EXIT_OK


def job_name(config: PrepareConfig, stage: str) -> str:
    """Return the name of a stage's job."""
    return f"prepare-{config.data.name}-{stage}"


def _stages(config: PrepareConfig) -> list[str]:
    """Return the stages that get a job. With one task, one job does all of them.

    `data.max_documents` counts documents in their order, so the job that selects reads them all.
    """
    if config.launch.tasks == 1:
        return ["all"]
    return [stage for stage in STAGES if not (stage == "clean" and config.data.max_documents)]


def _tasks(config: PrepareConfig, stage: str) -> str:
    """Return in words how many tasks a stage's job has."""
    return f"{config.launch.tasks} tasks, a job array" if stage in _DIVIDED else "1 task"


def _job(config: PrepareConfig, stage: str, arguments: Sequence[str], first: bool) -> Submission:
    options: dict[str, object] = {"ntasks": 1}
    if stage in _DIVIDED:
        options["array"] = f"0-{config.launch.tasks - 1}"
        arguments = [*arguments, f"launch.tasks={config.launch.tasks}"]
    if not first:
        options |= {"dependency": f"afterok:{_NUMBER}", "kill-on-invalid-dep": "yes"}
    environ = {"MEGATRAIN_MAX_FAULTS": str(config.launch.max_requeues)}
    words = [*arguments, f"launch.stage={stage}"]
    return Submission.of(config.launch, job_name(config, stage), words, "prepare.sbatch", options, environ)


def _after(job: Submission, before: str) -> Submission:
    """Return the submission with the number of the job before."""
    return Submission(job.script, [word.replace(_NUMBER, before) for word in job.command], job.environ)


def _as_shell(stage: str, job: Submission, before: str) -> str:
    """Return lines of a shell that submit a job and keep its number for the next."""
    text = str(_after(job, "BEFORE")).replace("afterok:BEFORE", f'afterok:"${{{before}%%;*}}"')
    return f"{stage}=$({text})"
