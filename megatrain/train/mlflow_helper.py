"""The process beside a training run that talks to MLflow: the sender, given the writer of the report. Imports no torch."""

from __future__ import annotations

from megatrain.report.run_page import report
from megatrain.tracking import mlflow_sender

if __name__ == "__main__":
    mlflow_sender.main(report)
