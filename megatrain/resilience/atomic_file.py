"""Atomic writes: a file is written under a temporary name beside the target, then renamed, so it appears whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends; after an error `path` is as it was.

    `durable` flushes the file and its directory entry to disk, so that it survives a power cut.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    # several processes may write the same file, also of machines whose process numbers are equal
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.writing")
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
        if isinstance(error, OSError) and error.filename is None:  # as after a failed write
            error.filename = str(path)
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
