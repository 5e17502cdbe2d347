"""The report's pipeline section: one step of the schedule in the run's config. Imports no torch.

The timeline is simulated, not measured: all stages cost the same, a backward costs two forwards, and communication is
free.
"""

from __future__ import annotations

from typing import Any

from megatrain.parallel.layout import data_parallel_degree, num_micro_batches
from megatrain.parallel.stages import LOOPED, V_SHAPED
from megatrain.planner.timeline import orders, simulate, theoretical_bubble
from megatrain.report.timeline_drawing import draw


def pipeline(config: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return `svg` and `text` for the page, or None if the run has no pipeline or its folder does not describe it."""
    starts = [event for event in events if event["kind"] in ("start", "resume")]
    world_size: Any = starts[-1].get("world_size") if starts else None
    parallel, train = config.get("parallel"), config.get("train")
    if not isinstance(parallel, dict) or not isinstance(train, dict):
        return None
    tp, pp, cp, v = (parallel.get(name, 1) for name in ("tp", "pp", "cp", "virtual_stages"))
    batch: Any = train.get("global_batch_size")
    micro: Any = train.get("micro_batch_size")
    schedule = parallel.get("schedule", "1f1b")
    if not all(type(value) is int and value > 0 for value in (world_size, tp, pp, cp, v, batch, micro)) or pp == 1:
        return None
    count = num_micro_batches(batch, micro, data_parallel_degree(world_size, (tp, pp, cp)))
    if not _fits(schedule, pp, v, count):
        return None
    # Idle time does not grow with the number of micro-batches, so a long step is simulated and drawn with fewer.
    simulated = min(count, 64 * pp)
    bubble = simulate(orders(schedule, pp, v, simulated)).bubble * simulated / count
    drawn = count if count <= 8 * pp else 4 * pp
    text = (
        f"{schedule}: {pp} ranks x {v} {'stage' if v == 1 else 'stages'}, {count:,} micro-batches per step. "
        f"Idle over ideal time {bubble:.1%} simulated, {theoretical_bubble(pp, v, count):.1%} by (p-1)/(v m)"
        f"{f'; the drawing shows {drawn} micro-batches' if drawn < count else ''}."
    )
    return {"svg": draw([("", simulate(orders(schedule, pp, v, drawn)))]), "text": text}


def _fits(schedule: Any, pp: int, virtual_stages: int, num_micro_batches: int) -> bool:
    """Return whether a schedule supports these numbers; a config edited by hand may hold anything."""
    if schedule in LOOPED:
        return virtual_stages > 1 and num_micro_batches >= pp and num_micro_batches % pp == 0
    if schedule in V_SHAPED:
        return virtual_stages == 2 and num_micro_batches >= 1
    return virtual_stages == 1 and num_micro_batches >= {"gpipe": 1, "1f1b": pp}.get(schedule, num_micro_batches + 1)
