"""This node's place in a Slurm job step, and the submission of a job of ours. Imports no torch.

What runs inside the job is slurm/train.sbatch: it starts one task a node, the agent of that node.
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

from megatrain.config import LaunchConfig
from megatrain.distributed.rank_environment import is_launched, number_from
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    ConfigError,
    EnvironmentFault,
    MegatrainError,
)
from megatrain.launch import nodes as peers

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A job step with one task a node, as the task on node number `node` sees it; `nodes` is Slurm's list of them."""

    key: str
    node: int
    num_nodes: int
    nodes: str

    @staticmethod
    def from_environ(environ: Mapping[str, str] | None = None) -> Step | None:
        """The step this process is a task of; None outside `srun` (a batch script, a shell) and under another launcher.

        Raises EnvironmentFault where the step has other than one task a node.
        """
        environ = os.environ if environ is None else environ
        if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ or is_launched(environ):
            return None
        if "SLURM_PTY_PORT" in environ:  # the shell of `srun --pty`, in which a person types
            return None
        given = {"SLURM_STEP_NUM_NODES": environ.get("SLURM_NNODES", "1"), **environ}
        num_nodes = number_from(given, "SLURM_STEP_NUM_NODES", 1, None)
        tasks = number_from(environ, "SLURM_STEP_NUM_TASKS", 1, None, default=num_nodes)
        if tasks != num_nodes:
            raise EnvironmentFault(
                f"srun started {tasks} tasks on {num_nodes} nodes; megatrain starts its ranks itself, from one task a node: "
                f"srun --nodes={num_nodes} --ntasks={num_nodes} --ntasks-per-node=1, with launch.nproc_per_node ranks each"
            )
        node = number_from(environ, "SLURM_PROCID", 0, num_nodes)
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
        return Step(f"{environ.get('SLURM_JOB_ID')}.{environ['SLURM_STEP_ID']}.{restart}", node, num_nodes, nodes)

    def meet(self, timeout_s: float) -> peers.Peers:
        """The agents of all nodes, once all are there. A signal that asks to stop ends this process until then."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stopped_early)
        return peers.connect(self.key, self.node, self.num_nodes, self.head(), timeout_s)

    def head(self) -> str:
        """The step's first node: MASTER_ADDR where the job's script or a site's profile has set it, else Slurm is asked."""
        if address := os.environ.get("MASTER_ADDR"):
            return address
        if not set(self.nodes) & set("[,"):
            return self.nodes
        if shutil.which("scontrol") is None:  # a container without Slurm
            raise EnvironmentFault(
                f"which of the nodes {self.nodes} is the first, only scontrol knows, and it is not on the PATH here; set "
                f'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun'
            )
        command = ["scontrol", "show", "hostnames", self.nodes]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode or not found.stdout.split():
            raise EnvironmentFault(f"{shlex.join(command)}: {found.stderr.strip() or 'no answer'}")
        return found.stdout.split()[0]


def num_nodes(config: LaunchConfig, step: Step | None) -> int:
    """Nodes of the job: the step's, else `launch.num_nodes`. Raises ConfigError where they differ."""
    if step is None:
        return config.num_nodes or 1
    if config.num_nodes not in (None, step.num_nodes):
        raise ConfigError(
            f"launch.num_nodes={config.num_nodes}, but Slurm gave this job step {step.num_nodes} nodes ({step.nodes}); "
            f"leave launch.num_nodes out, or submit with sbatch --nodes={config.num_nodes}"
        )
    return step.num_nodes


def check_plain_start(config: LaunchConfig, step: Step | None) -> None:
    """A start outside Slurm is one of this machine alone. Raises ConfigError."""
    if step is None and num_nodes(config, step) > 1:
        raise ConfigError(
            f"launch.num_nodes={config.num_nodes}: a plain start runs on this machine alone; submit the job with "
            f"launch=slurm or sbatch slurm/train.sbatch"
        )


def together(team: peers.Peers, act: Callable[[], T]) -> T:
    """Do something on every node. Where it fails on some, all end with the same exit code: the first of them says why.

    Raises MegatrainError on that node, and SystemExit on the others.
    """
    error: MegatrainError | None = None
    try:
        result = act()
    except MegatrainError as refused:
        error = refused
    told = team.all_gather([error.exit_code, str(error)] if error else None)
    first = next((node for node, one in enumerate(told) if one), None)
    if first is None:
        return result
    if error is not None and first == team.node:
        raise error if team.size == 1 else type(error)(f"{os.uname().nodename}: {error}")
    raise SystemExit(told[first][0])


def _stopped_early(number: int, _frame: FrameType | None) -> None:
    """A signal before there are ranks to hand it to: nothing is lost by starting again.

    TERM is what srun sends when another agent has ended, whose code has to count: srun's is the highest of all.
    """
    print(f"megatrain: stopped by {signal.Signals(number).name} before training began", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_SAVED_AFTER_SIGNAL if number == signal.SIGUSR1 else EXIT_DEFECT)


# ---------------------------------------------------------------------------------------------------- submitting


@dataclass(frozen=True)
class Submission:
    """What submits slurm/train.sbatch with some arguments of `megatrain train`: a command and what it needs in its
    environment."""

    script: Path
    command: list[str]
    environ: dict[str, str]

    @staticmethod
    def of(config: LaunchConfig, run_name: str, arguments: Sequence[str]) -> Submission:
        """Raises ConfigError where `launch.profile` does not exist."""
        script = Path(str(resources.files("megatrain.slurm") / "train.sbatch"))
        profile = find_profile(config.profile or os.environ.get("MEGATRAIN_PROFILE"), script.parent / "profiles")
        command = sbatch_command(config, run_name, script, arguments)
        environ = {"MEGATRAIN_PYTHON": sys.executable}
        if profile is not None:
            environ["MEGATRAIN_PROFILE"] = str(profile)
            # the profile's SBATCH_* variables count here, and what is given as an option counts more
            command = ["bash", "-c", 'source "$MEGATRAIN_PROFILE" && exec "$@"', "sbatch", *command]
        return Submission(script, command, environ)

    def __str__(self) -> str:
        """The command line that a person would type."""
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environ.items())
        return f"{settings} {shlex.join(self.command)}"

    def submit(self) -> str:
        """The number of the job that this is from now on.

        Raises ConfigError where Slurm refuses the job, EnvironmentFault where there is no sbatch here.
        """
        if shutil.which("sbatch") is None:
            raise EnvironmentFault(
                "launch=slurm: there is no sbatch on the PATH; submit from a login node of the cluster"
            )
        done = subprocess.run(self.command, env={**os.environ, **self.environ}, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"launch=slurm: Slurm refused the job: {done.stderr.strip()}")
        return done.stdout.strip().partition(";")[0]


def submit(config: LaunchConfig, run_name: str, arguments: Sequence[str], dry_run: bool) -> int:
    """Submit a job with these arguments of `megatrain train` and print its number; or only show it."""
    submission = Submission.of(config, run_name, arguments)
    if dry_run:
        print(submission)
        show_script(submission.script)
    else:
        print(submission.submit())
    return EXIT_OK


def show_script(script: Path) -> None:
    """Print what is submitted."""
    print(f"\n# {script}\n{script.read_text()}", end="")


def jobs_here() -> dict[str, str]:
    """Names and numbers of the user's jobs that have not ended and were submitted in this folder; none where Slurm does
    not say."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%Z|%j"]
    if shutil.which("squeue") is None:
        return {}
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split("|", 2) for line in told.stdout.splitlines() if line.count("|") >= 2]
    return {name: number for number, folder, name in lines if folder == os.getcwd()}


def sbatch_command(config: LaunchConfig, run_name: str, script: Path, arguments: Sequence[str]) -> list[str]:
    """The command that submits a job."""
    options = {"nodes": config.num_nodes or 1, "job-name": run_name}
    options |= {"partition": config.partition, "account": config.account, "time": config.time}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *config.sbatch_options, str(script), *arguments]


def find_profile(name: str | None, folder: Path) -> Path | None:
    """A cluster profile by its path, or by its name in `folder`. Raises ConfigError where there is none."""
    if name is None:
        return None
    for path in (Path(name), folder / f"{name}.sh"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.sh")))
    raise ConfigError(f"launch.profile={name} is neither a file nor a profile of {folder} (there: {known})")
