"""The end of the process that sends a run's records to MLflow."""

from __future__ import annotations

import subprocess
import sys


def test_it_ends_at_once_when_all_is_sent():
    """Python's own end, which takes a second where mlflow is imported, runs nothing that anybody waits for."""
    program = (
        "import atexit; from megatrain.training import mlflow_helper; "
        "atexit.register(print, 'Python takes its modules apart'); mlflow_helper.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, '{"finished": true}\n')
    assert "apart" not in done.stderr
