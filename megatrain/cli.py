"""The command line: parse it, compose and check the config, call the verb, map errors to exit codes. Imports no torch.

The verbs get the checked dataclass. A user's mistake becomes one message and an exit code here.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import megatrain
from megatrain.config import VERBS
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, SEARCH_PATH
from megatrain.config.suggest import did_you_mean
from megatrain.distributed.python_process import SAFE_PATH
from megatrain.distributed.rank_environment import WORKER_MARK, is_launched
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    MegatrainError,
    disk_fault,
)
from megatrain.resilience.fault_classes import memory_fault
from megatrain.resilience.terminal import Terminal, say

ACTIONS: dict[str, str] = {
    "prepare": "megatrain.verbs.prepare:prepare",
    "train": "megatrain.training.rank:run",
    "tune": "megatrain.training.rank:run",
    "layouts": "megatrain.verbs.layouts:layouts",
    "evaluate": "megatrain.verbs.evaluate:evaluate",
    "generate": "megatrain.verbs.generate:generate",
    "chat": "megatrain.verbs.chat:chat",
    "serve": "megatrain.verbs.serve:serve",
    "export": "megatrain.verbs.export:export_",
    "import": "megatrain.verbs.import_:import_",
    "merge": "megatrain.verbs.merge:merge",
    "compress": "megatrain.verbs.compress:compress",
    "inspect": "megatrain.verbs.inspect:inspect",
    "tokenizer": "megatrain.verbs.tokenizer:tokenizer",
    "tokenizers": "megatrain.verbs.tokenizers:tokenizers",
    "report": "megatrain.verbs.report:report",
}
"""The function behind each verb, as module:function; it is imported only when called, with the config."""

READERS = ("layouts", "evaluate", "generate", "chat", "inspect", "tokenizers")
"""Verbs that change nothing: what they print is all they are for. The others do their work even if nobody reads it."""

COMPLETION, COMPLETE = "--completion", "--complete"
"""Flags that print the script of a shell's completion, and that the script calls with the line so far."""

FLAGS = {
    "--help": "WORD: explain a verb; with a word: one group, the keys that mention it, or (all) every key",
    "--cfg": "print the resolved config as YAML and exit",
    "--config": "FILE: start from a saved config, such as runs/x/config.yaml",
    "--config-dir": "DIR: choices of your own, such as model=my from DIR/model/my.yaml",
    "--completion": "SHELL: print a script that completes commands in bash, zsh or fish",
    "--debug": "show the stack trace of an error",
    "--multirun": "train, tune: run every combination of several values, each as a separate run; short: -m",
    "--dry-run": "train or prepare with launch=slurm, or --multirun: show what would be submitted or started",
    "--version": "print the version",
}


@dataclass
class Arguments:
    """The parsed command line."""

    verb: str | None = None
    overrides: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    """A line for each key that is given several values."""
    flags: set[str] = field(default_factory=set)
    own_choices: list[str] = field(default_factory=list)
    """With --help: the words of `overrides` that name folders of the user's own choices."""
    asked: tuple[str, str] | None = None
    """A flag that asks for something else than a verb, and its value."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        _check_working_directory()
        code = run(parse(argv))
        sys.stdout.flush()
        terminal = Terminal.current()
        return _end_without_output(terminal.lost) if terminal is not None and terminal.lost is not None else code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:  # rich raises SystemExit when the reader has left
        terminal = Terminal.current()
        if terminal is not None and terminal.lost is not None:
            return _end_without_output(terminal.lost)
        if isinstance(error, SystemExit):
            raise
        user_error = error if isinstance(error, MegatrainError) else disk_fault(error) or memory_fault(error)
        if user_error is not None:
            if debug:
                traceback.print_exc()
            else:
                say(f"error: {_rank_prefix()}{user_error}")
            return user_error.exit_code
        traceback.print_exc()
        say("this is a defect of megatrain; please report it with the lines above")
        return EXIT_DEFECT


def _check_working_directory() -> None:
    """Raise ConfigError if the working directory was removed: relative paths lead nowhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be used ({error.strerror}); it was removed or replaced: change to a folder "
            f"that exists (cd)"
        ) from error


def command() -> NoReturn:
    """Run `main` and end the process with its exit code.

    A failed rank may hold a process group whose peers are gone, or a torch thread that still waits for them. With
    either, interpreter shutdown was seen to abort (`terminate called without an active exception`) and to lose the exit
    code that tells the agent what to do. Such a process therefore skips interpreter shutdown.
    """
    os.environ.setdefault(SAFE_PATH, "1")  # for the processes that libraries start
    terminal = Terminal.install()
    try:
        code = main()
    finally:
        terminal.close()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and (is_launched() or distributed.is_initialized()):
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def _end_without_output(error: OSError) -> int:
    """Return the exit code of a command whose standard output broke: 0 if its reader left (`| head`)."""
    if error.errno == errno.EPIPE:
        return EXIT_OK
    say(f"error: standard output cannot be written ({error.strerror})")
    return EXIT_ENVIRONMENT


def run(arguments: Arguments) -> int:
    """Run the parsed command and return its exit code."""
    from megatrain.config.compose import own_folders
    from megatrain.config.usage import overview, verb_help

    verb = arguments.verb
    if arguments.asked is not None:
        from megatrain.verbs.completion import answer

        print(answer(*arguments.asked, FLAGS), end="")
        return EXIT_OK
    if "--version" in arguments.flags:
        print(f"megatrain {megatrain.__version__}")
        return EXIT_OK
    if verb is None:
        print(overview(FLAGS))
        return EXIT_OK
    if "--help" in arguments.flags:
        print(verb_help(verb, arguments.overrides, own_folders(arguments.own_choices), FLAGS))
        return EXIT_OK
    if "--multirun" in arguments.flags or (verb == "tune" and _asks_for_folds(arguments.overrides)):
        if verb not in ("train", "tune"):
            raise ConfigError(
                f"--multirun runs a sweep of training runs: use train or tune with it, or {verb} without it"
            )
        from megatrain.verbs.multirun import multirun

        if not arguments.flags & {"--cfg", "--dry-run"}:
            _keep_going(verb)
        _warn_of_repetitions(arguments)
        return multirun(arguments.overrides, arguments.flags - {"--multirun"}, verb)
    from megatrain.verbs.path_checks import check_paths

    if verb == "tune":
        from megatrain.verbs.tune import train_words

        words = train_words(arguments.overrides, make=not arguments.flags & {"--cfg", "--dry-run"})
        verb, arguments.overrides = "train", words
    config = config_of(verb, arguments.overrides)
    if "--cfg" in arguments.flags:
        _warn_of_repetitions(arguments)
        print(to_yaml(config), end="")
        return EXIT_OK
    if "--dry-run" in arguments.flags and not (verb in ("train", "prepare") and config.launch.name == "slurm"):
        raise ConfigError(
            "--dry-run shows what megatrain train or prepare would submit or start; use it with launch=slurm or "
            "--multirun; --cfg shows the config of any command"
        )
    if "--dry-run" not in arguments.flags and verb not in READERS:
        _keep_going(verb)
    _warn_of_repetitions(arguments)
    if verb == "train" and not is_launched():
        from megatrain.verbs.train import start

        return start(config, sorted(arguments.flags), arguments.overrides)
    check_paths(config)
    action = _action(verb)
    also = {"prepare": (arguments.overrides, sorted(arguments.flags)), "tokenizer": (arguments.overrides,)}
    result = action(config, *also.get(verb, ()))
    return result if isinstance(result, int) else EXIT_OK  # some verbs return a path to callers in Python


def _asks_for_folds(overrides: list[str]) -> bool:
    from megatrain.verbs.folds import asks_for_folds

    return asks_for_folds(overrides)


def config_of(verb: str, overrides: list[str]) -> Any:
    """Return the checked config of a command. Raises ConfigError."""
    from megatrain.config.compose import compose
    from megatrain.verbs.start_checks import with_checkpoint_model
    from megatrain.verbs.value_checks import check_values

    config = compose(verb, with_checkpoint_model(verb, overrides) if verb == "train" else overrides)
    check_values(config)
    return config


def _warn_of_repetitions(arguments: Arguments) -> None:
    """Say which value of a key or group counts, once; after `_keep_going`, because a reader may be slow or gone."""
    for line in arguments.repeated if not is_launched() else ():
        say(f"warning: {line}")


def _keep_going(verb: str) -> None:
    """From now on let no broken stream end this command, and no slow reader block a training job."""
    if (terminal := Terminal.current()) is not None:
        terminal.keep_going(background=verb == "train")


def parse(argv: list[str]) -> Arguments:
    """Parse a command line. Raises ConfigError for an unknown verb or flag."""
    arguments = Arguments()
    words = iter(argv)
    for text in words:
        flag, equals, value = text.partition("=")
        if flag in (CONFIG_FILE, CONFIG_DIR, COMPLETION, COMPLETE):
            value = value if equals else next(words, "")
            if not value and flag != COMPLETE:
                raise ConfigError(f"{flag} needs a value ({flag} {FLAGS[flag]})")
            if flag in (COMPLETION, COMPLETE):
                return Arguments(asked=(flag, value))
            arguments.overrides.append(f"{flag}={value}")  # a part of the config, which ranks and jobs need as well
        elif text in ("-h", "--help", "help"):
            arguments.flags.add("--help")
        elif text == "-m":
            arguments.flags.add("--multirun")
        elif text.startswith("-"):
            if text not in FLAGS:
                rest = argv[argv.index(text) + 1 :]
                hint = did_you_mean("", flag, list(FLAGS)) if get_close_matches(flag, FLAGS, cutoff=0.75) else ""
                hint = hint or _as_override(arguments.verb, flag, value, rest)
                hint = hint or did_you_mean("", flag, list(FLAGS))
                raise ConfigError(f"unknown flag {text}{hint} (flags: {', '.join(FLAGS)})")
            arguments.flags.add(text)
        elif arguments.verb is None:
            if text not in VERBS:
                raise ConfigError(
                    f"unknown verb {text}{did_you_mean('', text, list(VERBS))} (verbs: {', '.join(VERBS)})"
                )
            arguments.verb = text
        else:
            arguments.overrides.append(text)
    if arguments.verb is not None and "--help" in arguments.flags:
        given = arguments.overrides
        arguments.own_choices = [text for text in given if text.partition("=")[0] in (CONFIG_DIR, SEARCH_PATH)]
        arguments.overrides = [text for text in given if not set("=/") & set(text)]  # words to select
    elif arguments.verb is not None:
        from megatrain.config.compose import repeated
        from megatrain.verbs.path_words import expand_path

        arguments.repeated = repeated(arguments.verb, arguments.overrides)
        arguments.overrides = expand_path(arguments.verb, arguments.overrides)
    return arguments


def _as_override(verb: str | None, flag: str, value: str, rest: list[str]) -> str:
    """Return advice to write `--steps 20` as `train.steps=20`; empty if no key of the verb has such a name."""
    from megatrain.config import walk
    from megatrain.config.choices import GROUPS
    from megatrain.config.suggest import nearest_key

    if verb is None:
        return ""
    helps = {key: f.metadata["help"] for key, f in walk(VERBS[verb]).items()}
    key = name if (name := flag.lstrip("-")) in helps else nearest_key(name, helps, GROUPS.get(verb, ()))
    if not value and rest and "=" not in rest[0] and not rest[0].startswith("--"):
        value = rest[0]
    return f"; write {key.partition('=')[0]}={shlex.quote(value) if value else '<value>'}" if key else ""


def to_yaml(config: Any) -> str:
    """Return a config as YAML, in the schema's order."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _action(verb: str) -> Callable[..., Any]:
    """Import and return the function behind a verb."""
    module, _, name = ACTIONS[verb].partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _rank_prefix() -> str:
    """Return `rank N: ` for messages under another launcher, whose ranks share a terminal; empty for rank 0.

    Every rank prints its message, because no rank knows whether the others have the same error.
    """
    if not is_launched() or WORKER_MARK in os.environ or os.environ["RANK"] == "0":
        return ""
    return f"rank {os.environ['RANK']}: "
