"""Atomic writes: a file or folder is written under a temporary name beside the target, then renamed: it appears whole.

What a killed process leaves under such a name is removed at the next start of the same work.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

WRITING = ".writing"
"""How the name of what is being written ends."""

TEMPORARY = re.compile(r"\.(?P<machine>[0-9a-f]{12})\.(?P<pid>\d+)\.[0-9a-f]{8}\.writing$")
"""The end of a name of `temporary_name`."""

LONGEST_S = 86400.0
"""Seconds after which nothing is still being written, whoever began it."""


def temporary_name(path: Path) -> Path:
    """Return a new name beside `path` for what is being written; it names the process, and the machine it runs on.

    Several processes may write the same path, also of machines that share a disk and have equal process numbers.
    """
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}{WRITING}")


def remove_abandoned(folder: Path) -> None:
    """Remove what has a temporary name in `folder` and whose process has ended, or that is older than a day."""
    for path in folder.glob(f".*{WRITING}"):
        if not (name := TEMPORARY.search(path.name)):
            continue
        is_gone = name["machine"] == _machine() and not _is_running(int(name["pid"]))
        with suppress(OSError):  # another process removes it too, or has finished it
            if is_gone or time.time() - path.stat().st_mtime > LONGEST_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _machine() -> str:
    """Return a word for this machine, its boot, and the namespace of its process numbers (of a container)."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _is_running(pid: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends; after an error `path` is as it was.

    `durable` flushes the file and its directory entry to disk, so that it survives a power cut.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        if isinstance(error, OSError):  # it names nothing after a failed write, and the temporary file otherwise
            error.filename, error.filename2 = str(path), None
        raise
    if durable:
        sync_path(path.parent)


def write_atomically(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Replace the content of `path` (text as UTF-8) atomically. See `replacing`."""
    with replacing(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's names, to disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
