"""Count what the ranks of a layout communicate in one optimizer step, and print a table beside the theory.

    python tests/measure/communication.py
    python tests/measure/communication.py --only deepspeed

The layouts are those of tests/parity/test_communication.py, on small models in fp32 over gloo. All ranks are compared;
the table shows rank 0. The exit code is 1 if a count differs from the theory.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.collectives import CELLS, Count, Kind, cell, expected, second_step
from support.ranks import run_ranks

from megatrain.planner.communication import Traffic, step_traffic


def main() -> int:
    """Run the requested layouts; return 1 if one differs from the theory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="layouts whose row has this text in its name")
    arguments = parser.parse_args()
    print("| layout | collective | over | calls: theory | counted | bytes: theory | counted | sent by the rank | for |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    differing, compared = 0, []
    for ranks, changes in CELLS:
        name = f"{ranks} ranks: " + " ".join(f"{key}={value}" for key, value in changes.items())
        label = name
        if arguments.only not in name:
            continue
        config, zero3 = cell(changes)
        counted = run_ranks(second_step, ranks, config, zero3)
        theory = [step_traffic(config, ranks, rank, zero3) for rank in range(ranks)]
        for count, traffic in zip(counted, theory, strict=True):
            differing += count != expected(traffic)
        for line in rows(counted[0], theory[0]):
            print(f"| {name} {line}", flush=True)
            name = ""
        if config.engine.name == "deepspeed":
            config.engine.name = "native"
            sums = [sum(part.wire_bytes for part in parts) for parts in (theory[0], step_traffic(config, ranks, 0))]
            compared.append(f"| {label} | {sums[0]:,} | {sums[1]:,} | {sums[0] / sums[1]:.2f} |")
    if compared:
        print("\n| sent by rank 0 in a step, bytes | deepspeed | native, the same layout | ratio |")
        print("| --- | ---: | ---: | ---: |", *compared, sep="\n")
    print(f"\n{differing} ranks differ from the theory")
    return int(differing > 0)


def rows(counted: dict[Kind, Count], theory: list[Traffic]) -> list[str]:
    """Return a line for each group, collective and dtype; an axis is named by every reason that uses it."""
    reasons: dict[Kind, list[Traffic]] = defaultdict(list)
    for part in theory:
        reasons[Kind(part.collective, part.members, part.dtype)].append(part)
    lines = []
    for kind in [*reasons, *(kind for kind in counted if kind not in reasons)]:
        parts = reasons[kind]
        should = expected(parts).get(kind, Count(0, 0))
        found = counted.get(kind, Count(0, 0))
        axes = ", ".join(dict.fromkeys(part.axis for part in parts)) or f"ranks {kind.members}"
        sent = sum(part.wire_bytes for part in parts)
        lines.append(
            f"| {kind.collective}, {kind.dtype} | {axes} ({len(kind.members)}) | {should.calls:,} | {found.calls:,} "
            f"| {should.num_bytes:,} | {found.num_bytes:,} | {sent:,} "
            f"| {'; '.join(dict.fromkeys(part.reason for part in parts)) or '**not in the theory**'} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
