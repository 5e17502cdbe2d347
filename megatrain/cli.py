"""The command line: picks the verb, has its config composed and checked, and calls who does the work. Torch-free.

Everything below takes the checked dataclass. A user's mistake ends here as one message and its exit code.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import megatrain
from megatrain.config import VERBS, ReportConfig, TrainConfig, walk
from megatrain.errors import EXIT_DEFECT, EXIT_OK, ConfigError, EnvironmentFault, MegatrainError
from megatrain.launch.environment import WORKER_MARK, is_launched
from megatrain.suggest import did_you_mean

if TYPE_CHECKING:
    from megatrain.launch.peers import Peers

ACTIONS: dict[str, str] = {
    "prepare": "megatrain.data.prepare:prepare",
    "train": "megatrain.launch.worker:run",
    "layouts": "megatrain.layouts:layouts",
    "evaluate": "megatrain.evaluate:evaluate",
    "generate": "megatrain.generation:generate",
    "export": "megatrain.checkpoint.huggingface_verbs:export_",
    "import": "megatrain.checkpoint.huggingface_verbs:import_",
    "inspect": "megatrain.inspection:inspect",
    "report": "megatrain.cli:report",
}
"""What each verb calls with its config, as module:function; imported only when called."""

FLAGS = {
    "--help": "explain the verb and its keys",
    "--cfg": "print the resolved config as YAML and end",
    "--debug": "show stack traces of errors",
    "--multirun": "train: run every combination of several values, each as a run of its own; short: -m",
    "--dry-run": "train launch=slurm or --multirun: show what would be submitted or started",
    "--version": "print the version",
}

EXIT_INTERRUPTED = 130

DISK_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ESTALE,
)
"""Answers of the system to a read or write that name a fault of the machine or its set-up, none of ours."""


@dataclass
class Arguments:
    """The command line, taken apart."""

    verb: str | None = None
    overrides: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        code = run(parse(argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("megatrain: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return EXIT_OK
        known = error if isinstance(error, MegatrainError) else disk_fault(error)
        if known is not None:
            if debug:
                traceback.print_exc()
            else:
                print(f"megatrain: error: {_speaker()}{known}", file=sys.stderr, flush=True)
            return known.exit_code
        traceback.print_exc()
        print("megatrain: this is a defect of megatrain; please report it with the lines above", file=sys.stderr)
        return EXIT_DEFECT


def command() -> NoReturn:
    """The process of one command: `main`, and out with its exit code.

    A rank that failed holds a process group whose peers may be gone, or a thread of torch's that still looks for them.
    Interpreter shutdown meets both, which was seen to abort (`terminate called without an active exception`) and to lose
    the code that tells the agent what to do.
    """
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and (is_launched() or distributed.is_initialized()):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody may be reading
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more (`| head`); what is left then goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, as under a test's capture
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def disk_fault(error: Exception) -> EnvironmentFault | None:
    """What a full, broken or forbidden disk answered, as an error for the user; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return EnvironmentFault(f"{error.filename or 'the disk'}: {error.strerror}")
    return None


def run(arguments: Arguments) -> int:
    """Do what the command line asks for."""
    from megatrain.usage import overview, verb_help

    verb = arguments.verb
    if "--version" in arguments.flags:
        print(f"megatrain {megatrain.__version__}")
        return EXIT_OK
    if verb is None:
        print(overview())
        return EXIT_OK
    if "--help" in arguments.flags:
        print(verb_help(verb))
        return EXIT_OK
    if "--multirun" in arguments.flags:
        if verb != "train":
            raise ConfigError(f"--multirun runs a sweep of training runs: megatrain train --multirun; {verb} has none")
        from megatrain.launch.sweep import multirun

        return multirun(arguments.overrides, arguments.flags - {"--multirun"})
    from megatrain.checks import check_paths, check_values
    from megatrain.compose import compose

    config = compose(verb, arguments.overrides)
    check_values(config)
    if "--cfg" in arguments.flags:
        print(to_yaml(config), end="")
        return EXIT_OK
    if "--dry-run" in arguments.flags and not (verb == "train" and config.launch.name == "slurm"):
        raise ConfigError(
            "--dry-run shows what `megatrain train` would submit (launch=slurm) or a sweep start (--multirun); nothing else "
            "has it"
        )
    if verb == "train" and not is_launched():
        return start(config, arguments)
    check_paths(config)
    result = _action(verb)(config)
    return result if isinstance(result, int) else EXIT_OK  # some verbs return what they wrote, for callers in Python


def parse(argv: list[str]) -> Arguments:
    """Take a command line apart. Raises ConfigError for a verb or a flag that does not exist."""
    arguments = Arguments()
    for text in argv:
        if text in ("-h", "--help", "help"):
            arguments.flags.add("--help")
        elif text == "-m":
            arguments.flags.add("--multirun")
        elif text.startswith("-"):
            if text not in FLAGS:
                raise ConfigError(
                    f"unknown flag {text}{did_you_mean('', text, list(FLAGS))} (flags: {', '.join(FLAGS)})"
                )
            arguments.flags.add(text)
        elif arguments.verb is None:
            if text not in VERBS:
                raise ConfigError(
                    f"unknown verb {text}{did_you_mean('', text, list(VERBS))} (verbs: {', '.join(VERBS)})"
                )
            arguments.verb = text
        else:
            arguments.overrides.append(text)
    if arguments.verb is not None:
        arguments.overrides = _name_the_path(arguments.verb, arguments.overrides)
    return arguments


def _name_the_path(verb: str, overrides: list[str]) -> list[str]:
    """A first argument without `=` is the path of the verbs that have one."""
    if "path" in walk(VERBS[verb]) and overrides and "=" not in overrides[0]:
        from hydra.core.override_parser.types import Quote, QuotedString

        return [f"path={QuotedString(overrides[0], Quote.single).with_quotes()}", *overrides[1:]]
    return overrides


def start(config: TrainConfig, arguments: Arguments) -> int:
    """Start a training job: submit it (`launch=slurm`), or be the agent of this node and return the job's exit code."""
    from megatrain.checks import check_paths
    from megatrain.launch import slurm
    from megatrain.launch.peers import Alone

    assert config.run.name is not None, "compose gives every run a name"
    step = slurm.Step.from_environ()
    if step is None and config.launch.name == "slurm":
        check_paths(config)
        words = [*sorted(arguments.flags - {"--dry-run"}), *arguments.overrides]
        return slurm.submit(config.launch, config.run.name, words, dry_run="--dry-run" in arguments.flags)
    slurm.check_plain_start(config.launch, step)
    peers = step.meet(config.launch.timeout_s) if step else Alone()
    try:
        slurm.together(peers, lambda: check_paths(config))
        return start_workers(config, arguments, peers)
    finally:
        peers.close()


def start_workers(config: TrainConfig, arguments: Arguments, peers: Peers) -> int:
    """Run this command as `launch.nproc_per_node` workers on this machine and return the job's exit code.

    Node 0's agent owns the run's folder, for all.
    """
    from megatrain.launch.local import Recovery, launch
    from megatrain.launch.slurm import together
    from megatrain.resilience.ledger import process_age
    from megatrain.resilience.owner import FOLDER, Ownership
    from megatrain.resilience.watchdog import Limits

    command = [sys.executable, "-m", "megatrain", "train", *sorted(arguments.flags), *arguments.overrides]
    run_dir = Path(config.run.dir) / str(config.run.name)
    hang_s = config.resilience.hang_timeout_s or (120.0 if has_gpu(config.launch.device) else 600.0)
    limits = Limits(hang_s, config.launch.timeout_s)
    taken = together(peers, lambda: Ownership.take(run_dir) if peers.node == 0 else None)
    try:
        number = peers.share(taken.number if taken else None)[0]
        owner = taken or Ownership(run_dir / FOLDER, number)
        copies = config.checkpoint.copies_every(has_gpu(config.launch.device)) > 0
        since = time.monotonic() - process_age()
        modules = worker_modules(config)
        recovery = Recovery(run_dir, owner, config.resilience.max_restarts, limits, copies, modules, since)
        return launch(command, config.launch.nproc_per_node, run_dir / "logs", recovery, peers)
    finally:
        if taken is not None:
            taken.release()


def worker_modules(config: TrainConfig) -> list[str]:
    """What a worker imports on its way to the first step, but for what may touch a GPU: forks cannot share that."""
    modules = ["megatrain.compose", "megatrain.checks", "megatrain.launch.worker", "megatrain.engine.native"]
    if config.engine.name == "deepspeed" and not has_gpu(config.launch.device):
        modules[-1] = "megatrain.engine.deepspeed"
        modules.append("deepspeed")
    return modules


def has_gpu(device: str) -> bool:
    """Whether workers will run on NVIDIA GPUs, found without torch."""
    return device == "cuda" or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))


def report(config: ReportConfig) -> None:
    """`megatrain report`."""
    from megatrain.tracking.report import report as report_run
    from megatrain.tracking.report_sweep import report_sweep
    from megatrain.tracking.sweep import is_sweep_folder

    path = Path(config.path)
    write = report_sweep if is_sweep_folder(path) else report_run
    print(write(path, Path(config.out) if config.out is not None else None))


def to_yaml(config: Any) -> str:
    """A config as YAML, in the schema's order."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _action(verb: str) -> Callable[[Any], Any]:
    """The function that does a verb's work."""
    module, _, name = ACTIONS[verb].partition(":")
    return getattr(import_module(module), name)


def _speaker() -> str:
    """Under somebody else's launcher all ranks share a terminal: each but the first says which it is.

    None keeps still, though most mistakes are everybody's: whether the others made the same one, no rank can know.
    """
    if not is_launched() or WORKER_MARK in os.environ or os.environ["RANK"] == "0":
        return ""
    return f"rank {os.environ['RANK']}: "
