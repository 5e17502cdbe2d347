"""Random faults on one job, one after the other; `tools/soak.py --minutes 30` is the long version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "soak.py"


def test_random_faults_change_nothing_and_are_accounted_for():
    """The run is bit-identical to the undisturbed one, MLflow has every step once, the ledger is complete, and goodput
    is as predicted."""
    command = [sys.executable, str(TOOL), "--minutes", "1", "--seed", "7", "--mean", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok  ") == 6, done.stdout
