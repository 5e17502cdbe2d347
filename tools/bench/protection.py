"""What all fault tolerance costs while nothing fails: python tools/bench/protection.py --model small

Two jobs of two ranks train the same samples at once and take turns (alternation.py). The protected one runs as a user
runs it: under the agent with its heartbeats, ledger and fork server, with the loss guard, the comparison of ranks, the
exchange of their reports, background saves and copies in memory. The bare one is two plain processes with all that
turned off; it saves nothing. A turn's figure is the wall time from the end of its first step to the end of its last,
saves included, over the number of steps between. The verdict is the median of protected over bare, with an interval
that holds the true median with 95% probability. A turn must be shorter than resilience.hang_timeout_s, because clocks
go on while a job is stopped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from alternation import ENDLESS, Job, Records, alternate
from intervals import median_interval
from turns import TurnFailed, environ, prepare

from megatrain.distributed.rank_environment import WORKER_MARK
from megatrain.launch.nodes import SingleNode
from megatrain.launch.rank_process import free_port, rank_environ

RANKS = 2
OFF = [
    "checkpoint.every=0", "checkpoint.memory_every=0", "launch.preflight=false", "resilience.spike_zscore=0",
    "resilience.slow_rank_ratio=0", "resilience.max_restarts=0",
]  # fmt: skip


def main() -> int:
    """Measure. Return 1 if a job failed, 2 if it is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="preset of conf/model (default small)")
    parser.add_argument("--turns", type=int, default=20, help="turns of each (default 20)")
    parser.add_argument("--seconds", type=float, default=20.0, help="a turn's length (default 20)")
    parser.add_argument("--save", type=int, default=50, help="steps between saves of the protected job (default 50)")
    parser.add_argument("--copy", type=int, default=10, help="steps between its copies in memory (default 10)")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of both train commands")
    arguments = parser.parse_args()
    words = [
        f"model={arguments.model}", "launch.device=cpu", f"launch.nproc_per_node={RANKS}", "train.global_batch_size=8",
        "train.micro_batch_size=4", "train.seq_len=256", "optim.schedule=constant", "train.eval_every=0",
        "tracking=none", *arguments.overrides, f"train.steps={ENDLESS}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="megatrain-protection-") as name:
        folder = Path(name)
        try:
            words = prepare(folder, words, "cpu")["words"]
        except TurnFailed as error:
            print(f"protection.py: {error}", file=sys.stderr)
            return 2
        command = [sys.executable, "-m", "megatrain", "train", *words]
        protected, bare = Job("protected", folder), Job("bare", folder)
        saves = [f"checkpoint.every={arguments.save}", f"checkpoint.memory_every={arguments.copy}"]
        port, own = free_port(), environ(1, "cpu")
        try:
            protected.start([*command, *saves, "run.name=protected"], own)
            for rank in range(RANKS):
                place = rank_environ(rank, RANKS, SingleNode(), port)  # the settings of the memory allocator included
                del place[WORKER_MARK]  # no agent watches it
                bare.start([*command, *OFF, "run.name=bare"], {**place, **own})
            times = alternate([protected, bare], arguments.turns, arguments.seconds, wall_time)
        except TurnFailed as error:
            print(f"protection.py: {error}", file=sys.stderr)
            return 1
        finally:
            for job in (protected, bare):
                job.kill()
    for job in (protected, bare):
        print(f"{job.name}: {1e3 * statistics.median(times[job.name]):.1f} ms a step")
    ratio = median_interval([p / b for p, b in zip(times["protected"], times["bare"], strict=True)])
    print(f"protected / bare: {ratio}, {ratio.num_values} turns each")
    return 0


def wall_time(records: Records) -> float:
    """Return the wall time of a turn's steps after the first, in seconds a step."""
    first, last = (datetime.fromisoformat(records[n]["time"].replace("Z", "+00:00")) for n in (0, -1))
    return (last - first).total_seconds() / (len(records) - 1)


if __name__ == "__main__":
    sys.exit(main())
