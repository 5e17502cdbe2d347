"""Entry point of the process that sends a run's records to MLflow, with the report's writer. Imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatrain.tracking import mlflow_sender


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the run's report. Imported when it is due, so that an error there costs the report alone."""
    from megatrain.report.run_page import report

    return report(run_dir, out)


def describe_model(run_dir: Path) -> dict[str, Any]:
    """Return what the model registry keeps of the newest model of a run; empty if there is none."""
    from megatrain.checkpoint.lineage import find_line, tags

    line = find_line(run_dir)
    return tags(line) if line else {}


def run() -> None:
    """Serve until the end, then end this process at once: everything is sent, and the trainer waits for its end.

    Python would first take apart all that mlflow has imported, for a second or two.
    """
    mlflow_sender.main(write_report, describe_model)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


if __name__ == "__main__":
    run()
