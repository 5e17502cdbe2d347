"""Entry point of the process that sends a run's records to MLflow, with the report's writer. Imports no torch."""

from __future__ import annotations

from megatrain.report.run_page import report
from megatrain.tracking import mlflow_sender

if __name__ == "__main__":
    mlflow_sender.main(report)
