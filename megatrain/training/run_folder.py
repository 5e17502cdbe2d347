"""Write the files of a run's folder: the resolved config, the tokenizer and each rank's log."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from megatrain.config import TrainConfig
from megatrain.errors import cannot_write
from megatrain.resilience.atomic_file import remove_abandoned, write_atomically
from megatrain.resilience.owner import FOLDER as OWNERS
from megatrain.resilience.terminal import Terminal, say, show

_LOG = logging.getLogger("megatrain")


def run_folder(config: TrainConfig) -> Path:
    """Return the folder of a run."""
    return Path(config.run.dir) / str(config.run.name)


class TerminalWarnings(logging.Handler):
    """Handler that prints one line per warning to the terminal; stack traces go only to the log file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, which the log file has too."""
        line = f"megatrain: {record.levelname.lower()}: {record.getMessage()}"
        if (terminal := Terminal.current()) is not None:
            terminal.show(line)
        else:
            show(line)


class LogFile(logging.FileHandler):
    """Log file whose disk may fill up: the first failure is shown on the terminal, and nothing is raised."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Show the first failure."""
        if not self.failed:
            self.failed = True
            say(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]}); training goes on")

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to(run_dir: Path, rank: int) -> Iterator[None]:
    """Send this rank's log records to logs/rank_00000.log, and rank 0's warnings to the terminal too.

    What the rank prints on its terminal goes to the log as well, until the process ends.

    Raises:
        ConfigError, EnvironmentFault: the folder cannot be written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        path = run_dir / "logs" / f"rank_{rank:05d}.log"
        file = LogFile(path, encoding="utf-8", errors="backslashreplace")  # a message may have half a surrogate pair
        if (terminal := Terminal.current()) is not None:
            terminal.log_to(path, redirect=True)
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file, TerminalWarnings()] if rank == 0 else [file]
    level, propagate = _LOG.level, _LOG.propagate
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False  # a library that configures the root logger would show each warning twice
    for handler in handlers:
        _LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _LOG.removeHandler(handler)
            handler.close()
        _LOG.setLevel(level)
        _LOG.propagate = propagate


def write_run_folder(run_dir: Path, config: TrainConfig, dataset: Path) -> None:
    """Write the resolved config and copy the dataset's tokenizer, so that the folder does not depend on the dataset."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    for folder in (run_dir, run_dir / OWNERS):
        remove_abandoned(folder)
    write_atomically(run_dir / "config.yaml", text)
    source, target = dataset / "tokenizer", run_dir / "tokenizer"
    if source.is_dir() and not target.exists():
        copying = run_dir / "tokenizer.tmp"
        shutil.rmtree(copying, ignore_errors=True)
        shutil.copytree(source, copying)
        os.replace(copying, target)
