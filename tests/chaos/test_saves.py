"""Faults of checkpoints and of the disk they are on, in real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path):
    """A short one of `tools/kill_saves.py --n 1000`."""
    command = [sys.executable, str(TOOLS / "kill_saves.py"), "--n", "30", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 corrupt loads, 0 written checkpoints lost" in done.stdout
    assert int(re.search(r"(\d+) of them while a save was under way", done.stdout)[1]) >= 5, done.stdout
