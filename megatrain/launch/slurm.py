"""Slurm: this node's place in a job step, and the submission of jobs. Imports no torch.

A training job runs slurm/train.sbatch, which starts one task per node: the agent of that node.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TypeVar

from megatrain.config import JobConfig, LaunchConfig
from megatrain.distributed.rank_environment import is_launched, number_from
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    ConfigError,
    EnvironmentFault,
    MegatrainError,
)
from megatrain.launch.nodes import Peers, connect
from megatrain.resilience.terminal import say

T = TypeVar("T")

NO_CONTROLLER = (
    "configuration source",
    "contact slurm controller",
    "Connection refused",
    "Socket timed out",
    "resolve_ctls",
)
"""Parts of sbatch's messages that mean that no controller answered, rather than that one refused the job."""


@dataclass(frozen=True)
class Step:
    """A job step with one task per node, seen from node `node`. `key` is unique; `nodes` is Slurm's node list."""

    key: str
    node: int
    num_nodes: int
    nodes: str

    @staticmethod
    def from_environ(environ: Mapping[str, str] | None = None) -> Step | None:
        """Return the step of this process, or None outside `srun` (a batch script, a shell) or under another launcher.

        Raises EnvironmentFault unless the step has one task per node.
        """
        environ = os.environ if environ is None else environ
        if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ or is_launched(environ):
            return None
        if "SLURM_PTY_PORT" in environ:  # an interactive shell of `srun --pty`
            return None
        given = {"SLURM_STEP_NUM_NODES": environ.get("SLURM_NNODES", "1"), **environ}
        num_nodes = number_from(given, "SLURM_STEP_NUM_NODES", 1, None)
        tasks = number_from(environ, "SLURM_STEP_NUM_TASKS", 1, None, default=num_nodes)
        if tasks != num_nodes:
            raise EnvironmentFault(
                f"srun started {tasks} tasks on {num_nodes} nodes; megatrain starts its ranks itself, from one task "
                f"per node: srun --nodes={num_nodes} --ntasks={num_nodes} --ntasks-per-node=1, with "
                f"launch.nproc_per_node ranks each"
            )
        node = number_from(environ, "SLURM_PROCID", 0, num_nodes)
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
        return Step(f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}.{restart}", node, num_nodes, nodes)

    def meet(self, timeout_s: float) -> Peers:
        """Connect to the agents of all nodes. Until the ranks start, SIGTERM or SIGUSR1 ends this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stopped_early)
        return connect(self.key, self.node, self.num_nodes, self.head(), timeout_s)

    def head(self) -> str:
        """Return the step's first node: MASTER_ADDR if the job's script or profile sets it, else as Slurm lists it.

        Raises EnvironmentFault if scontrol is needed, but missing or failing.
        """
        if address := os.environ.get("MASTER_ADDR"):
            return address
        if not set(self.nodes) & set("[,"):
            return self.nodes
        if shutil.which("scontrol") is None:  # a container without Slurm
            raise EnvironmentFault(
                f"scontrol, which lists the first of the nodes {self.nodes}, is not on the PATH here; set "
                f'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun'
            )
        command = ["scontrol", "show", "hostnames", self.nodes]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode or not found.stdout.split():
            raise EnvironmentFault(f"{shlex.join(command)}: {found.stderr.strip() or 'no answer'}")
        return found.stdout.split()[0]


def num_nodes(config: LaunchConfig, step: Step | None) -> int:
    """Return the job's number of nodes: the step's, or else `launch.num_nodes`. Raises ConfigError if they differ."""
    if step is None:
        return config.num_nodes or 1
    if config.num_nodes not in (None, step.num_nodes):
        raise ConfigError(
            f"launch.num_nodes={config.num_nodes}, but Slurm gave this job step {step.num_nodes} nodes ({step.nodes}); "
            f"leave launch.num_nodes out, or submit with sbatch --nodes={config.num_nodes}"
        )
    return step.num_nodes


def check_plain_start(config: LaunchConfig, step: Step | None) -> None:
    """Raise ConfigError for several nodes outside Slurm: a plain start runs on this machine only."""
    if step is None and num_nodes(config, step) > 1:
        raise ConfigError(
            f"launch.num_nodes={config.num_nodes}: a plain start runs on this machine only; submit the job with "
            f"launch=slurm or sbatch slurm/train.sbatch"
        )


def together(team: Peers, act: Callable[[], T]) -> T:
    """Call `act` on every node and return its result. If it fails on some, all exit with the code of the first of them.

    Raises MegatrainError on that node, and SystemExit on the others.
    """
    error: MegatrainError | None = None
    try:
        result = act()
    except MegatrainError as refused:
        error = refused
    errors = team.all_gather([error.exit_code, str(error)] if error else None)
    first = next((node for node, one in enumerate(errors) if one), None)
    if first is None:
        return result
    if error is not None and first == team.node:
        raise error if team.size == 1 else type(error)(f"{os.uname().nodename}: {error}")
    raise SystemExit(errors[first][0])


def _stopped_early(number: int, _frame: FrameType | None) -> None:
    """Exit on a signal that arrives before the ranks start: there is nothing to save.

    srun sends SIGTERM when another agent has exited. That agent's exit code must win, and srun returns the highest one:
    hence EXIT_DEFECT, the lowest.
    """
    say(f"stopped by {signal.Signals(number).name} before training began")
    raise SystemExit(EXIT_SAVED_AFTER_SIGNAL if number == signal.SIGUSR1 else EXIT_DEFECT)


# ---------------------------------------------------------------------------------------------------- submitting


@dataclass(frozen=True)
class Submission:
    """The command that submits a script of slurm/ with arguments for it, and variables to set for it."""

    script: Path
    command: list[str]
    environ: dict[str, str]

    @staticmethod
    def of(
        config: JobConfig,
        job_name: str,
        arguments: Sequence[str],
        script_name: str = "train.sbatch",
        options: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Submission:
        """Prepare the submission, with more options of sbatch by name. Raises ConfigError for a missing profile."""
        script = Path(str(resources.files("megatrain.slurm") / script_name))
        profile = find_profile(config.profile or os.environ.get("MEGATRAIN_PROFILE"), script.parent / "profiles")
        command = sbatch_command(config, job_name, script, arguments, options or {})
        environ = {"MEGATRAIN_PYTHON": sys.executable, **(environ or {})}
        if profile is not None:
            environ["MEGATRAIN_PROFILE"] = str(profile)
            # the profile's SBATCH_* variables apply, but the command's options override them
            command = ["bash", "-c", 'source "$MEGATRAIN_PROFILE" && exec "$@"', "sbatch", *command]
        return Submission(script, command, environ)

    def __str__(self) -> str:
        """Return the command line that a user would type."""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environ.items())
        return f"{settings} {shlex.join(self.command)}"

    def submit(self) -> str:
        """Submit the job and return its number.

        Raises ConfigError if Slurm refuses the job, EnvironmentFault if there is no sbatch on the PATH.
        """
        if shutil.which("sbatch") is None:
            raise EnvironmentFault(
                "launch=slurm: there is no sbatch on the PATH; submit from a login node of the cluster"
            )
        done = subprocess.run(self.command, env={**os.environ, **self.environ}, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()
            if any(sign in said for sign in NO_CONTROLLER):
                raise EnvironmentFault(f"launch=slurm: Slurm's controller cannot be reached from here: {said}")
            raise ConfigError(f"launch=slurm: Slurm refused the job: {said}")
        return done.stdout.strip().partition(";")[0]


def submit(config: LaunchConfig, run_name: str, arguments: Sequence[str], dry_run: bool) -> int:
    """Submit a job with these arguments for `megatrain train` and print its number; a dry run only prints the job."""
    submission = Submission.of(config, run_name, arguments, options={"nodes": config.num_nodes or 1})
    if dry_run:
        show_dry_run(submission.script, [f"job {run_name}: {_size(config, arguments)}, launch.device={config.device}"])
        print(submission)
    else:
        print(submission.submit())
    return EXIT_OK


def _size(config: LaunchConfig, arguments: Sequence[str]) -> str:
    """Return the numbers of nodes and ranks of a job that these arguments would submit, in words."""
    nodes, ranks = config.num_nodes or 1, config.nproc_per_node
    words = "1 node" if nodes == 1 else f"{nodes} nodes"
    if any(word.startswith("launch.nproc_per_node=") for word in arguments):
        total = f" ({nodes * ranks} in all)" if nodes > 1 else ""
        return f"{words} with {ranks} rank{'s' * (ranks > 1)}{' each' * (nodes > 1)}{total}"
    return f"{words} with one rank for each GPU that Slurm gives, or {ranks}{' each' * (nodes > 1)} without GPUs"


def show_dry_run(script: Path, jobs: Sequence[str]) -> None:
    """Print what a dry run would submit, a line for each of `jobs`, as comments of a shell before its commands."""
    several = len(jobs) > 1
    print("# dry run: nothing was submitted")
    print("\n".join(f"# {job}" for job in jobs))
    print(f"# batch script: {script}")
    print(f"# to submit {'them' if several else 'it'}: leave out --dry-run, or run the command{'s' * several} below")


@dataclass(frozen=True)
class QueuedJob:
    """An unfinished job: its number (of an array with its tasks, as in 7_[1-3]), name and comment."""

    number: str
    name: str
    comment: str


def queue_here() -> list[QueuedJob]:
    """Return the user's unfinished jobs that were submitted from this folder.

    Empty if squeue is missing or fails.
    """
    command = ["squeue", "--me", "--noheader", "--format=%i|%Z|%k|%j"]
    if shutil.which("squeue") is None:
        return []
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split("|", 3) for line in listed.stdout.splitlines() if line.count("|") >= 3]
    return [QueuedJob(number, name, comment) for number, folder, comment, name in lines if folder == os.getcwd()]


def jobs_here() -> dict[str, str]:
    """Return the numbers, by name, of the jobs of `queue_here`."""
    return {job.name: job.number for job in queue_here()}


def sbatch_command(
    config: JobConfig, job_name: str, script: Path, arguments: Sequence[str], options: Mapping[str, object]
) -> list[str]:
    """Return the sbatch command that submits a job."""
    options = {**options, "job-name": job_name}
    options |= {"partition": config.partition, "account": config.account, "time": config.time}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *config.sbatch_options, str(script), *arguments]


def find_profile(name: str | None, folder: Path) -> Path | None:
    """Find a cluster profile by its path or by its name in `folder`.

    Raises ConfigError if there is none, or if it is no script that bash can read.
    """
    if name is None:
        return None
    for path in (Path(name), folder / f"{name}.sh"):
        if path.is_file():
            checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
            if checked.returncode:
                raise ConfigError(f"launch.profile={name}: bash cannot read it: {checked.stderr.strip()}")
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.sh")))
    raise ConfigError(f"launch.profile={name} is neither a file nor a profile of {folder} (there: {known})")
