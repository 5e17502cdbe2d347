"""The embedded database `<run.dir>/mlflow.db`: created whole or not at all. Runs in the helper process.

MLflow creates its tables in dozens of separate steps, and cannot continue after it was killed between two of them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from megatrain.resilience.atomic_file import sync_path
from megatrain.tracking.mlflow_store import is_half_made

SETTLE_S = 5.0
"""Seconds without a change after which nobody is creating a database any more: `mlflow ui` creates one in place."""
COMPANIONS = ("", "-journal", "-wal", "-shm")
"""Endings of a database's files: SQLite applies a journal to whatever database lies beside it."""


def prepare_database(path: Path, artifacts: str) -> str | None:
    """Create MLflow's database `path` if it is missing or half made. Return a warning if it was half made.

    A database that holds any runs is left as it is. The caller holds a lock, so that one process does this at a time.
    `artifacts` is the address of MLflow's default experiment's artifacts.

    Raises:
        OSError: a file in the folder cannot be renamed or removed.
    """
    for leftover in path.parent.glob(f"{path.name}.creating-*"):  # of a process that was killed
        leftover.unlink()
    temporary = path.with_name(f"{path.name}.creating-{time.time_ns()}")  # MLflow keeps a failed one's connections
    aside = _set_aside(path) if path.exists() else None
    if not path.exists():
        _create(temporary, artifacts)
        if not path.exists():  # another program may have created it meanwhile
            _remove(path)
            os.rename(temporary, path)
            sync_path(path.parent)
    if aside is None:
        return None
    return (
        f"{path} was half made and held no runs, because MLflow was stopped while it created the tables; "
        f"a new database was made, and the old one is now {aside.name}"
    )


def _create(path: Path, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path}", artifacts)
    store.engine.dispose()


def _set_aside(path: Path) -> Path | None:
    """Rename a half-made database. Return its new path, or None if it is whole, or not for us to judge."""
    while _is_half_made(path):
        if abs(time.time() - path.stat().st_mtime) < SETTLE_S:
            time.sleep(0.2)
            continue
        aside = path.with_name(f"{path.stem}.half-made-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        for ending in COMPANIONS:
            if (companion := Path(f"{path}{ending}")).exists():
                companion.rename(f"{aside}{ending}")
        return aside
    return None


def _is_half_made(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            return is_half_made(database)
    except sqlite3.Error:
        return False  # locked, or no database: MLflow says what is wrong


def _remove(path: Path) -> None:
    """Remove a database's files, if there are any."""
    for ending in COMPANIONS:
        Path(f"{path}{ending}").unlink(missing_ok=True)
