"""Entry point of the process that sends a run's records to MLflow, with the report's writer. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatrain.tracking import mlflow_sender


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the run's report. Imported when it is due, so that an error there costs the report alone."""
    from megatrain.report.run_page import report

    return report(run_dir, out)


if __name__ == "__main__":
    mlflow_sender.main(write_report)
