"""Compare a step's time between two checkouts of megatrain: python tools/bench/revisions.py OLD NEW --model tiny

Both train the same job at once and take turns (alternation.py). A turn's figure is the median of the steps that lie
wholly in it; the verdict is the median of new over old, with an interval that holds the true median with 95%
probability.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from alternation import ENDLESS, Job, Records, alternate
from intervals import median_interval
from turns import TurnFailed, environ, prepare, usable_cores


def main() -> int:
    """Compare. Return 1 if a job failed, 2 if it is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout, such as: git worktree add ../old main~20")
    parser.add_argument("new", type=Path, help="the other one")
    parser.add_argument("--model", default="tiny", help="preset of conf/model (default tiny)")
    parser.add_argument("--turns", type=int, default=40, help="turns of each (default 40)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a turn's length, at least three steps (default 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads a process (default: usable cores)")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of the train command")
    arguments = parser.parse_args()
    words = [
        f"model={arguments.model}", "engine=native", "launch.device=cpu", "train.global_batch_size=8",
        "train.micro_batch_size=4", "train.seq_len=256", "optim.schedule=constant", "checkpoint.every=0",
        "train.eval_every=0", "tracking=none", *arguments.overrides, f"train.steps={ENDLESS}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="megatrain-revisions-") as name:
        folder = Path(name)
        try:
            words = prepare(folder, words, "cpu")["words"]
        except TurnFailed as error:
            print(f"revisions.py: {error}", file=sys.stderr)
            return 2
        try:
            times = take_turns(arguments, words, folder)
        except TurnFailed as error:
            print(f"revisions.py: {error}", file=sys.stderr)
            return 1
    for name in NAMES:
        print(f"{name}: {1e3 * statistics.median(times[name]):.1f} ms a step ({getattr(arguments, name)})")
    ratio = median_interval([new / old for old, new in zip(times["old"], times["new"], strict=True)])
    print(f"new / old: {ratio}, {ratio.num_values} turns each")
    return 0


NAMES = ("old", "new")


def take_turns(arguments: argparse.Namespace, words: list[str], folder: Path) -> dict[str, list[float]]:
    """Return each turn's median step time in seconds, by checkout.

    Raises:
        TurnFailed: a folder is no checkout; a job ended, was too slow to start, or finished too few steps in a turn.
    """
    checkouts = {name: getattr(arguments, name).resolve() for name in NAMES}
    for checkout in checkouts.values():
        if not (checkout / "megatrain" / "__main__.py").exists():
            raise TurnFailed(f"{checkout} is no checkout of megatrain")
    jobs = [Job(name, folder) for name in NAMES]
    for job in jobs:
        command = [sys.executable, "-m", "megatrain", "train", *words, f"run.name={job.name}"]
        job.start(command, {**environ(arguments.threads, "cpu"), "PYTHONPATH": str(checkouts[job.name])})
    return alternate(jobs, arguments.turns, arguments.seconds, median_step)


def median_step(records: Records) -> float:
    """Return the median time of a turn's steps, in seconds."""
    return float(statistics.median(record["step_time_s"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
