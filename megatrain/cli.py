"""The command line: picks the verb, has its config composed and checked, and calls who does the work. Torch-free.

Everything below takes the checked dataclass. A user's mistake ends here as one message and its exit code.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NoReturn

import megatrain
from megatrain.config import VERBS, walk
from megatrain.config.suggest import did_you_mean
from megatrain.distributed.rank_environment import WORKER_MARK, is_launched
from megatrain.errors import EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_OK, ConfigError, MegatrainError, disk_fault

ACTIONS: dict[str, str] = {
    "prepare": "megatrain.verbs.prepare:prepare",
    "train": "megatrain.train.rank:run",
    "layouts": "megatrain.verbs.layouts:layouts",
    "evaluate": "megatrain.verbs.evaluate:evaluate",
    "generate": "megatrain.verbs.generate:generate",
    "export": "megatrain.verbs.export:export_",
    "import": "megatrain.verbs.import_:import_",
    "inspect": "megatrain.verbs.inspect:inspect",
    "report": "megatrain.verbs.report:report",
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


def run(arguments: Arguments) -> int:
    """Do what the command line asks for."""
    from megatrain.config.usage import overview, verb_help

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
        from megatrain.verbs.multirun import multirun

        return multirun(arguments.overrides, arguments.flags - {"--multirun"})
    from megatrain.config.compose import compose
    from megatrain.verbs.path_checks import check_paths
    from megatrain.verbs.value_checks import check_values

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
        from megatrain.verbs.train import start

        return start(config, sorted(arguments.flags), arguments.overrides)
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
