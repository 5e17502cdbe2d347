"""A preparation divided among the tasks of Slurm arrays: the jobs of its stages, each after the one before.

A job runs slurm/prepare.sbatch, which does one `launch.stage` of `megatrain prepare`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatrain.config import PrepareConfig
from megatrain.config.launch_config import STAGES
from megatrain.errors import EXIT_OK, ConfigError, MegatrainError
from megatrain.launch.slurm import Submission, queue_here, show_dry_run

_DIVIDED = ("clean", "encode")
_NUMBER = "{before}"  # stands for the number of the job before


def submit(
    config: PrepareConfig, arguments: Sequence[str], dry_run: bool, settings: Mapping[str, object] | None = None
) -> int:
    """Submit the jobs of a preparation and print the number and stage of each; a dry run only prints them.

    `arguments` are those of `megatrain prepare`, without any of `launch=`. If its jobs are in the queue already, they
    are printed and none is submitted. `settings` are those that make the dataset what it is.

    Raises `ConfigError` if jobs of the dataset with other settings are in the queue, and as `Submission.submit`; then
    none of the new jobs is left in the queue.
    """
    stages = _stages(config)
    comment = _comment(config, settings)
    jobs = [_job(config, stage, arguments, comment, first=stage == stages[0]) for stage in stages]
    if dry_run:
        show_dry_run(jobs[0].script, [f"job {job_name(config, stage)}: {_tasks(config, stage)}" for stage in stages])
        for stage, job in zip(stages, jobs, strict=True):
            print(_as_shell(stage, job, before=stages[stages.index(stage) - 1]))
        return EXIT_OK
    if queued := _queued(config, comment):
        for name, number in queued.items():
            print(f"{number}  {name} (in the queue already)")
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


def _comment(config: PrepareConfig, settings: Mapping[str, object] | None) -> str:
    """Return the comment of the jobs, by which they are known in the queue: digests of the folder and the settings."""
    target = str((Path(config.data.dir) / config.data.name).absolute())
    texts = (target, json.dumps(settings, sort_keys=True, default=str))
    return ":".join(
        ["megatrain", *(hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16] for text in texts)]
    )


def _queued(config: PrepareConfig, comment: str) -> dict[str, str]:
    """Return the numbers, by name, of the jobs of this preparation in the queue.

    One with a comment that is not megatrain's, as `launch.sbatch_options` may give it, is taken for one of them.
    Raises `ConfigError` if jobs prepare the same folder with other settings, or in other stages.
    """
    names = [job_name(config, stage) for stage in (*STAGES, "all")]
    place, _, settings = comment.rpartition(":")
    found, others = {}, []
    for job in queue_here():
        is_known = job.comment.startswith("megatrain:")
        if job.name not in names or (is_known and not job.comment.startswith(f"{place}:")):  # another data.dir
            continue
        number = job.number.partition("_")[0]
        if is_known and not job.comment.endswith(f":{settings}"):
            others.append(number)
        else:
            found[job.name] = number
    if others:
        numbers = " ".join(dict.fromkeys(others))
        raise ConfigError(
            f"data.name={config.data.name}: jobs that prepare {Path(config.data.dir) / config.data.name} with other "
            f"settings are in the queue ({numbers}); wait until they have ended, end them with scancel {numbers}, or "
            "choose another data.name"
        )
    return dict(sorted(found.items(), key=lambda item: names.index(item[0])))


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


def _job(config: PrepareConfig, stage: str, arguments: Sequence[str], comment: str, first: bool) -> Submission:
    options: dict[str, object] = {"ntasks": 1, "comment": comment}
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
