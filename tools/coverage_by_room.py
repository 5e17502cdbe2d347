"""Print the test coverage in .coverage: one line for the rooms below a threshold, and the total.

    python tools/coverage_by_room.py

`bash tools/test.sh --coverage` calls it. Only the unit tier is measured, because the ranks of the other tiers are
forked processes that end without writing their coverage.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import PurePath

LOW = 80
"""Percent of the lines of a room."""


def main() -> None:
    """Read the report of the coverage package and print it by room."""
    command = [sys.executable, "-m", "coverage", "json", "-q", "-o", "-"]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file, found in report["files"].items():
        parts = PurePath(file).parts
        room = rooms[parts[1] if parts[0] == "megatrain" else parts[0]]
        room[0] += found["summary"]["covered_lines"]
        room[1] += found["summary"]["num_statements"]
    shares = {room: 100 * covered / count for room, (covered, count) in sorted(rooms.items()) if count}
    low = [f"{room} {share:.0f}%" for room, share in shares.items() if share < LOW]
    print(f"coverage of the unit tests below {LOW}%: {', '.join(low) or 'no room'}")
    print(f"coverage of the unit tests in total: {report['totals']['percent_covered']:.0f}%")


if __name__ == "__main__":
    main()
