"""The MLflow process beside a training run: the sender, given the writer of the report. Imports no torch."""

from __future__ import annotations

from megatrain.report.run_page import report
from megatrain.tracking import mlflow_sender

if __name__ == "__main__":
    mlflow_sender.main(report)
