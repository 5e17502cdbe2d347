"""Measure what data parallelism costs on one machine.

Two independent one-thread jobs run side by side, each with half of the batch and without communication. They alternate
(A B A B …) with `megatrain train` on two ranks with the whole batch and one thread each.

    python tools/bench/scaling.py --model small --seq-len 256 --batch 16 --micro-batch 4 --zero 1

Both load the machine equally, so the ratio of step times, the efficiency, shows the cost of communication and sharding.
A turn's figure is the median step time; for the two independent jobs it is the mean of both medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from intervals import median_interval
from turns import MegatrainProcess, Turn, TurnFailed, commit, machine, prepare, probe, usable_cores

GOAL = 0.85


def main() -> int:
    """Measure. Return 2 if the job is refused or fails."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            result = measure(arguments, Path(folder))
        except TurnFailed as error:
            print(f"scaling: error: {error}", file=sys.stderr)
            return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    found = median_interval(result["each"])
    print(
        f"efficiency of 2 ranks (zero={arguments.zero}): {found} with {found.coverage:.1%} coverage "
        f"over {found.num_values} pairs; goal {GOAL}: {'reached' if found.value >= GOAL else 'missed'}"
    )
    return 0


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="preset of conf/model (default small)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of turns (default 10)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a turn (default 40)")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not timed (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads a rank, and an independent job (default 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step of the two ranks together (default 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a sequence (default 256)")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2, 3), default=1, help="parallel.zero of the two ranks (default 1)"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of the train command")
    arguments = parser.parse_args()
    if arguments.batch % (2 * arguments.micro_batch) or arguments.pairs < 1:
        parser.error("--batch must be a multiple of 2 x --micro-batch, and --pairs at least 1")
    if arguments.warmup < 1 or arguments.steps <= arguments.warmup:
        parser.error("--steps must be more than --warmup, and --warmup at least 1")
    if 2 * arguments.threads > usable_cores():
        print(
            f"scaling: two times {arguments.threads} threads are more than the {usable_cores()} cores here",
            file=sys.stderr,
        )
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take all turns and return the whole result. Raise `TurnFailed` if one fails."""
    own = probe("megatrain")
    words = [
        f"model={arguments.model}", "engine=native", f"precision={arguments.precision}", "launch.device=cpu",
        f"train.steps={arguments.steps}", f"train.micro_batch_size={arguments.micro_batch}",
        f"train.seq_len={arguments.seq_len}", "optim.schedule=constant", "checkpoint.every=0", *arguments.overrides,
    ]  # fmt: skip
    jobs = {}
    for name, batch in (("half", arguments.batch // 2), ("whole", arguments.batch)):
        (folder / name).mkdir()
        jobs[name] = prepare(folder / name, [*words, f"train.global_batch_size={batch}"], "cpu")
    turns: list[Turn] = []
    each = []
    for number in range(1, arguments.pairs + 1):
        alone = side_by_side(jobs["half"], 2, [], folder, arguments, number, "independent")
        layout = ["launch.nproc_per_node=2", f"parallel.zero={arguments.zero}"]
        together = side_by_side(jobs["whole"], 1, layout, folder, arguments, number, "two ranks")
        turns += alone + together
        each.append(statistics.mean(turn.step_s for turn in alone) / together[0].step_s)
        print(
            f"pair {number}/{arguments.pairs}: "
            f"independent {' and '.join(f'{t.step_s * 1e3:.1f}' for t in alone)} ms a step, "
            f"two ranks {together[0].step_s * 1e3:.1f} ms, efficiency {each[-1]:.3f}",
            flush=True,
        )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tools/bench/scaling.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(own),
        "versions": own["versions"],
        "threads": arguments.threads,
        "warmup": arguments.warmup,
        "job": jobs["whole"],
        "turns": [asdict(turn) for turn in turns],
        "each": each,
        "efficiency": asdict(median_interval(each)),
    }


def side_by_side(
    job: dict[str, Any],
    count: int,
    extra: list[str],
    folder: Path,
    arguments: argparse.Namespace,
    number: int,
    name: str,
) -> list[Turn]:
    """Run several jobs at once and return a turn for each. Raise `TurnFailed` if one fails."""
    places = [Path(tempfile.mkdtemp(dir=folder)) for _ in range(count)]
    started = [MegatrainProcess(job, place, arguments.threads, extra) for place in places]
    turns, failure = [], None
    for process in started:
        try:
            turns.append(process.turn(number, arguments.warmup))
        except TurnFailed as error:
            failure = error
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    if failure is not None:
        raise failure
    for turn in turns:
        turn.contender = name
    return turns


if __name__ == "__main__":
    sys.exit(main())
