"""The few errors a user can meet, each with its stable exit code (docs/reference/exit_codes.md lists them). Imports nothing heavy.

A user's mistake raises one of these with a message that names the key or file, what was given and what would
work. Anything else that escapes is a defect of ours: exit code 1 and a stack trace in the log.
"""

from __future__ import annotations

import errno
from pathlib import Path

EXIT_OK = 0
EXIT_DEFECT = 1
EXIT_NO_PROGRESS = 6
EXIT_SAVED_AFTER_SIGNAL = 75


class MegatrainError(Exception):
    """Base of the errors whose message is meant for the user; shown without a stack trace."""

    exit_code = EXIT_DEFECT


class ConfigError(MegatrainError):
    """Bad config or arguments."""

    exit_code = 2


class DataError(MegatrainError):
    """Bad data: a corpus, a tokenizer or a prepared dataset that cannot be used as it is."""

    exit_code = 3


class CheckpointError(MegatrainError):
    """Bad checkpoint: damaged, incomplete, or not the one this run may continue from."""

    exit_code = 4


class DivergedError(MegatrainError):
    """Training diverged and will not recover by itself."""

    exit_code = 5


class OwnedError(MegatrainError):
    """Another job owns the run folder."""

    exit_code = 7


class EnvironmentFault(MegatrainError):
    """The machine: a peer unreachable, versions differ, a device or a disk missing. Worth a retry elsewhere."""

    exit_code = 8


def cannot_write(folder: Path, error: OSError) -> MegatrainError:
    """A run's folder refuses: a disk that is full, broken or read-only is the machine's fault, the rest a wrong `run.dir`."""
    broken = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
    kind = EnvironmentFault if broken else ConfigError
    return kind(f"run.dir: {folder} cannot be written ({error.strerror})")
