"""`launch.*`: processes, nodes and devices. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class JobConfig:
    """How a job is submitted to Slurm."""

    name: str = key(
        "local", "local does the work on this machine; slurm submits a job and returns", choices=("local", "slurm")
    )
    profile: str | None = key(
        None,
        "launch=slurm: cluster profile, a path or a name in slurm/profiles; null means $MEGATRAIN_PROFILE",
        path=True,
    )
    partition: str | None = key(
        None, "launch=slurm: sbatch --partition; null leaves the choice to the profile or to Slurm"
    )
    account: str | None = key(None, "launch=slurm: sbatch --account")
    time: str | None = key(
        None, "launch=slurm: sbatch --time, the time limit for each start of the job, for example 1-00:00:00"
    )
    max_requeues: int = key(
        10,
        "Slurm: starts in a row that end with a fault of the machines and finish no new step, after which the job is "
        "not requeued any more",
        minimum=0,
    )
    sbatch_options: list[str] = key([], "launch=slurm: more sbatch options, for example ['--qos=high']")


@dataclass
class LaunchConfig(JobConfig):
    """Processes and devices."""

    name: str = key(
        "local", "local starts the ranks on this machine; slurm submits a job and returns", choices=("local", "slurm")
    )
    nproc_per_node: int = key(1, "ranks per node", minimum=1)
    num_nodes: int | None = key(None, "nodes; null means 1, or under srun all nodes of the job step", minimum=1)
    device: str = key(
        "auto", "cpu, cuda, or auto: cuda if there is a device for every rank", choices=("auto", "cpu", "cuda")
    )
    timeout_s: float = key(600.0, "longest wait for a peer or a collective, in seconds", above=0, maximum=1e7)
    preflight: bool = key(
        True, "before training, check versions, devices, an all-reduce, the disk and the tracking server on all nodes"
    )


STAGES = ("clean", "select", "encode", "publish")
"""The stages of a divided preparation, in order. Tasks share `clean` and `encode`; one process does the others."""


@dataclass
class PrepareLaunchConfig(JobConfig):
    """Where a preparation runs, and in how many tasks."""

    name: str = key(
        "local",
        "local prepares on this machine; slurm submits jobs and returns: an array of tasks for each divided stage",
        choices=("local", "slurm"),
    )
    max_requeues: int = key(
        10, "Slurm: how often a task that ended with a fault, or at its time limit, is started again", minimum=0
    )
    tasks: int = key(1, "tasks that divide the work; the dataset is the same, bit for bit, with any number", minimum=1)
    task: int | None = key(
        None,
        "launch.stage=clean or encode: which of launch.tasks this is, from 0; null if it is alone",
        minimum=0,
    )
    stage: str = key(
        "all",
        "do one stage of a divided preparation and end: clean and encode with each launch.task, select and publish "
        "once, in this order; all does them here, or submits them (launch=slurm)",
        choices=("all", *STAGES),
    )
