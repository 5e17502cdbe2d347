"""`run.*`: the identity of a run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class RunConfig:
    """The identity of a run."""

    name: str | None = key(None, "run identity; null means <model.name>-<data.name>, so the same command resumes")
    dir: str = key("runs", "folder of all runs; the run's own folder is <run.dir>/<run.name>", path=True)
    sweep: str | None = key(
        None, "sweep that the run belongs to, with the folder <run.dir>/<run.sweep>; --multirun sets it"
    )
