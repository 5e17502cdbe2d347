"""The records that checkpoints in tests keep beside their tensors."""

from __future__ import annotations

from typing import Any

from megatrain.checkpoint.manifest import EngineCounters, Identity, Progress, RunRecord


def at(
    step: int, counters: EngineCounters | None = None, identity: Identity | None = None, **progress: Any
) -> RunRecord:
    """Return the record of a run at `step`."""
    return RunRecord(Progress(step, **progress), counters or EngineCounters(), identity or Identity())
