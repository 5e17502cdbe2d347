"""Report the ranks that slow the others down, from each rank's time in a step excluding waits."""

from __future__ import annotations

import logging
import socket

from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.parallel.layout import Layout
from megatrain.resilience.stragglers import Stragglers
from megatrain.tracking.journal import Journal

_LOG = logging.getLogger("megatrain")


class SlowRankWatch:
    """Detector that compares ranks of the same pipeline stage. All ranks create one; only the main rank's is active."""

    def __init__(self, config: TrainConfig, world: World, layout: Layout, journal: Journal) -> None:
        self.journal = journal
        self.hosts = world.all_gather_json(socket.gethostname())
        self.stragglers: Stragglers | None = None
        if world.is_main and world.size > 1 and config.resilience.slow_rank_ratio:
            stages = [layout.coordinate(rank).pp for rank in range(world.size)]
            self.stragglers = Stragglers(stages, config.resilience.slow_rank_ratio)

    def __call__(self, step: int, own_times: list[float]) -> None:
        """Compare the ranks' times in `step`; log and record each rank that became slow or recovered."""
        if self.stragglers is None:
            return
        for found in self.stragglers.judge(own_times):
            host = self.hosts[found.rank]
            detail = {"rank": found.rank, "host": host, "ratio": round(found.ratio, 3)}
            detail |= {"own_s": found.own_s, "others_s": found.others_s}
            self.journal.event("slow_rank" if found.is_slow else "slow_rank_over", step, **detail)
            if found.is_slow:
                _LOG.warning(
                    "rank %d on %s is slow, and all others wait for it: %.3g s of its own a step, %.2f times the "
                    "%.3g s of its peers (step %d)",
                    *(found.rank, host, found.own_s, found.ratio, found.others_s, step),
                )
            else:
                _LOG.warning("rank %d on %s is as fast as the others again (step %d)", found.rank, host, step)
