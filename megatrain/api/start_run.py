"""`megatrain.train`: `megatrain train` from Python, in processes of its own. Imports no torch."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatrain.api.run_record import Run
from megatrain.cli import config_of, parse
from megatrain.distributed.python_process import python_command
from megatrain.errors import EXIT_OK, ConfigError, MegatrainError
from megatrain.resilience.signals import set_parent_death_signal
from megatrain.resilience.terminal import show

KEPT_LINES = 30
"""Last lines of the output that an error quotes at most."""
POLL_MS = 200


def train(overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Run `megatrain train` with these overrides until it ends, and return its run.

    `overrides` are the words of the command line, without the shell's quotes, as in
    `train(["experiment=quickstart", "train.steps=50"])`; a run's folder among them continues that run. The output is
    printed as it comes, unless `quiet`. A bad config is refused at once. An interrupt (Ctrl-C, a notebook's stop
    button) saves a checkpoint and ends the run; a second one ends it without saving. If this process ends, the run
    saves and stops.

    Raises:
        MegatrainError: the run failed or was stopped; the subclass is that of the exit code
            (docs/reference/exit_codes.md), which is in `exit_code`.
        KeyboardInterrupt: it was interrupted, after it has ended.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"train takes a list of overrides, not one string: train({overrides.split()!r})")
    if not isinstance(overrides, Iterable):
        raise ConfigError(f'train takes a list of overrides such as ["train.steps=50"], given {overrides!r}')
    arguments = parse(["train", *map(str, overrides)])
    if arguments.flags:
        raise ConfigError(
            f"train takes overrides alone, not {', '.join(sorted(arguments.flags))}; use the command line"
        )
    config = config_of("train", arguments.overrides)
    if config.launch.name == "slurm":
        raise ConfigError(
            "train waits for a run on this machine, but launch=slurm only submits one: use megatrain train, "
            "and then megatrain.Run(folder)"
        )
    folder = Path(config.run.dir, str(config.run.name)).absolute()  # before the program changes its working directory
    code, lines = _follow(python_command("megatrain", "train", *arguments.overrides), quiet)
    if code != EXIT_OK:
        raise _error(code, lines)
    return Run(folder)


def _follow(command: Sequence[str], quiet: bool) -> tuple[int, list[str]]:
    """Run a command to its end; return its exit code and the last lines of its output.

    After an error here the command gets SIGTERM, and is waited for.

    Raises:
        KeyboardInterrupt: this process was interrupted meanwhile. The command got the signal too and has ended.
    """
    parent, linux = os.getpid(), sys.platform == "linux"
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C reaches it once, from here
        preexec_fn=(lambda: set_parent_death_signal(parent, signal.SIGTERM)) if linux else None,
    )
    assert process.stdout is not None
    output = _Output(process, quiet)
    interrupted = False
    try:
        while True:
            try:
                if not output.more():
                    break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    finally:
        process.stdout.close()
        if process.poll() is None:  # an error here, such as that of a notebook whose front end has gone
            process.terminate()
            process.wait()
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode, list(output.lines)


class _Output:
    """The output of a process: printed, and its last lines kept."""

    def __init__(self, process: subprocess.Popen[bytes], quiet: bool) -> None:
        assert process.stdout is not None
        self._process = process
        self._file = process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN)
        self._quiet = quiet
        self._rest = b""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)

    def more(self) -> bool:
        """Wait a moment for output. Return False once the process has ended and all it wrote was read."""
        ended = self._process.poll() is not None  # asked first: what it wrote before its end is then in the pipe
        if self._poll.poll(0 if ended else POLL_MS):
            data = os.read(self._file, 1 << 16)
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._take(line)
            if data:
                return True
            self._process.wait()
            ended = True
        if ended and self._rest:
            self._take(self._rest)
            self._rest = b""
        return not ended

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.lines.append(text)
        if not self._quiet:
            show(text, sys.stdout)


def _error(code: int, lines: Sequence[str]) -> MegatrainError:
    """Return the error of an exit code, with the command's last error message, or else its last lines."""
    marked = [number for number, line in enumerate(lines) if line.startswith("megatrain: error:")]
    shown = [line.removeprefix("megatrain: error:").strip() for line in lines[marked[-1] :]] if marked else lines
    kind = next((kind for kind in MegatrainError.__subclasses__() if kind.exit_code == code), MegatrainError)
    error = kind("\n".join(shown) or f"megatrain train ended with exit code {code} and printed nothing")
    error.exit_code = code
    return error
