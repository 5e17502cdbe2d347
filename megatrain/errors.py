"""The errors a user can meet, and every exit code (docs/reference/exit_codes.md lists them). Imports nothing heavy.

A user's mistake raises one of these errors, with a message that names the key or file, what was given and what would
work. Any other exception is a defect of ours: exit code 1 and a stack trace in the log.
"""

from __future__ import annotations

import errno
from pathlib import Path

EXIT_OK = 0
EXIT_DEFECT = 1
EXIT_BAD_CONFIG = 2
EXIT_BAD_DATA = 3
EXIT_BAD_CHECKPOINT = 4
EXIT_DIVERGED = 5
EXIT_NO_PROGRESS = 6
EXIT_OWNED = 7
EXIT_ENVIRONMENT = 8
EXIT_SAVED_AFTER_SIGNAL = 75
EXIT_INTERRUPTED = 130
"""A second Ctrl-C in training, or one in any other verb: stopped at once."""

BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""System errors of a disk that is full, read-only, failing or gone, or of a limit on the size of files (ulimit -f).
Another machine may do better."""

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
"""System errors of a limit on open files (ulimit -n)."""

UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
"""System errors of a path that this user cannot read or write, or that is not the kind of file it should be."""


class MegatrainError(Exception):
    """Base class of errors whose message is written for the user and shown without a stack trace."""

    exit_code = EXIT_DEFECT


class ConfigError(MegatrainError):
    """Bad config or arguments."""

    exit_code = EXIT_BAD_CONFIG


class RewardError(ConfigError):
    """A reward function that cannot be loaded, raises, hangs or returns no numbers."""


class DataError(MegatrainError):
    """Bad data: a corpus, a tokenizer or a prepared dataset that cannot be used."""

    exit_code = EXIT_BAD_DATA


class CheckpointError(MegatrainError):
    """Bad checkpoint: damaged, incomplete, or one that this run may not continue from."""

    exit_code = EXIT_BAD_CHECKPOINT


class DivergedError(MegatrainError):
    """Training diverged, and the loss guard gave up."""

    exit_code = EXIT_DIVERGED


class OwnedError(MegatrainError):
    """Another job owns the run folder."""

    exit_code = EXIT_OWNED


class EnvironmentFault(MegatrainError):
    """A fault of the machine: a peer unreachable, versions differ, a device or disk missing.

    Worth a retry elsewhere.
    """

    exit_code = EXIT_ENVIRONMENT


class LostPeerError(EnvironmentFault):
    """Another rank ended or is out of reach. The other ranks' logs say why."""


def how_to_install(extra: str) -> str:
    """Return how to install one of megatrain's extras: from its clone, as an index may have another `megatrain`."""
    return f"pip install '.[{extra}]' in megatrain's clone"


def cannot_write(path: Path, error: OSError, key: str = "run.dir") -> MegatrainError:
    """Return the error for a path that cannot be written: a broken disk, or else a wrong value of its `key`."""
    kind = EnvironmentFault if error.errno in BROKEN_DISK else ConfigError
    return kind(f"{key}: {path} cannot be written ({error.strerror})")


def disk_fault(error: Exception) -> EnvironmentFault | None:
    """Return a failed read or write as an error for the user; None for every other exception."""
    if isinstance(error, OSError) and error.errno in (*BROKEN_DISK, *UNUSABLE_PATH):
        return EnvironmentFault(f"{error.filename or 'the disk'}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _TOO_MANY:
        return EnvironmentFault(f"{error.filename or 'a file'}: {error.strerror}; raise the limit, see ulimit -n")
    return None
