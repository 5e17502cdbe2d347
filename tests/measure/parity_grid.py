"""Compare every legal layout with one process, on CPU in fp32, and print a table of the deviations.

    python tests/measure/parity_grid.py --world 2 4 --family gpt2
    python tests/measure/parity_grid.py --world 8 --sample 40

The cells come from the table of layouts. A cell is what tests/parity/test_layouts.py runs: a few steps with an
uneven number of ignored labels. The exit code is 1 if a cell deviates, fails or hangs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.jobs import LIMITS, deviations, layout_job, parity_steps
from support.ranks import run_ranks

from megatrain.parallel.layout import Layout
from megatrain.planner.candidates import Axes, judge


def cells(world: int, compiled: bool = False) -> list[dict[str, Any]]:
    """Return every legal combination of the axes on `world` ranks as arguments of `layout_job`.

    Hybrid sharding uses two groups.
    """
    job = layout_job(compile=compiled)
    found = []
    for engine in ("native", "deepspeed"):
        for candidate, refused, _ in judge(job, world, Axes(engines=(engine,), replicas=(1, 2))):
            dp = world // (candidate.tp * candidate.pp * candidate.cp)
            if refused is None and (candidate.dp_replicate == 1 or dp % 2 == 0):
                cell = candidate._asdict()
                for key, needs in (
                    ("schedule", "pp"),
                    ("virtual_stages", "pp"),
                    ("cp_kind", "cp"),
                    ("dp_replicate", "dp_replicate"),
                ):
                    if cell[needs] == 1:
                        del cell[key]
                found.append({**cell, "compile": True} if compiled else cell)
    return found


def main() -> int:
    """Run the requested cells; return 1 if any is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default 1 2 4)")
    parser.add_argument("--family", nargs="+", choices=("llama", "gpt2"), default=["llama", "gpt2"])
    parser.add_argument("--engine", choices=("native", "deepspeed"), help="only this engine")
    parser.add_argument("--sample", type=int, help="so many cells of each world and family, drawn with a fixed seed")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a cell may take (default 300)")
    parser.add_argument(
        "--compile", action="store_true", help="the same cells with compiled blocks, where that is legal"
    )
    parser.add_argument("--list", action="store_true", help="print the cells and end")
    arguments = parser.parse_args()
    failed, worst, total = 0, dict.fromkeys(LIMITS, 0.0), 0
    print("| ranks | family | layout | " + " | ".join(LIMITS) + " | seconds |")
    print("| ---: | --- | --- | " + "---: | " * (len(LIMITS) + 1))
    for family in arguments.family:
        expected = None
        for world in arguments.world:
            chosen = [cell for cell in cells(world, arguments.compile) if arguments.engine in (None, cell["engine"])]
            if arguments.sample is not None and arguments.sample < len(chosen):
                chosen = random.Random(world).sample(chosen, arguments.sample)
            for cell in chosen:
                name = f"{Layout.of(layout_job(**cell), world).describe()}" + "".join(
                    f" {key}={cell[key]}"
                    for key in ("cp_kind", "dp_replicate", "recompute", "compile")
                    if cell.get(key) not in (None, "none")
                )
                if arguments.list:
                    print(f"| {world} | {family} | {name} |")
                    continue
                if expected is None:
                    with tempfile.TemporaryDirectory() as folder:
                        expected = run_ranks(parity_steps, 1, layout_job(family=family, micro=8), folder, 10)[0]
                started = time.monotonic()
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        config = layout_job(family=family, **cell)
                        found = deviations(
                            run_ranks(parity_steps, world, config, folder, 10, timeout_s=arguments.timeout), expected
                        )
                    bad = [key for key, value in found.items() if not value <= LIMITS[key]]
                    shown = [f"**{found[key]:.1e}**" if key in bad else f"{found[key]:.1e}" for key in LIMITS]
                    worst = {key: max(worst[key], found[key]) for key in LIMITS}
                except (AssertionError, TimeoutError) as error:
                    bad, shown = (
                        ["run"],
                        [f"**{str(error).strip().splitlines()[-1][:120]}**"] + [""] * (len(LIMITS) - 1),
                    )
                total, failed = total + 1, failed + bool(bad)
                print(
                    f"| {world} | {family} | {name} | {' | '.join(shown)} | {time.monotonic() - started:.1f} |",
                    flush=True,
                )
    if not arguments.list:
        print(f"\n{total} cells, {failed} not as they should be; largest deviations: ", end="")
        print(", ".join(f"{key} {value:.1e} (limit {LIMITS[key]:g})" for key, value in worst.items()))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
