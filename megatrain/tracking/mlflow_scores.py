"""Send scores of an evaluation to the MLflow run of a run's folder, after training. Imports mlflow where it is used."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from megatrain.tracking.mlflow import tracking_uri, without_password
from megatrain.tracking.mlflow_sender import FORBIDDEN

_LOG = logging.getLogger("megatrain")


def send_scores(run_dir: Path, step: int, scores: Mapping[str, float]) -> str | None:
    """Log scores at a step of the run's MLflow run, if the run has one there; return its id, else None.

    A server that cannot be used is a warning: the scores are in the run's folder too.
    """
    return _send(run_dir, step, scores, of_sweep=False)


def send_sweep_scores(run_dir: Path, scores: Mapping[str, float]) -> str | None:
    """Log scores of a sweep at its own MLflow run, the parent of that of the run `run_dir`; as `send_scores`."""
    return _send(run_dir, 0, scores, of_sweep=True)


def _send(run_dir: Path, step: int, scores: Mapping[str, float], of_sweep: bool) -> str | None:
    run_id = _run_id(run_dir)
    if run_id is None:
        return None
    try:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri(run_dir.parent))
        if of_sweep and (run_id := client.get_run(run_id).data.tags.get("mlflow.parentRunId")) is None:
            return None
        moment = round(time.time() * 1000)
        metrics = [
            Metric(FORBIDDEN.sub("_", name), float(value), moment, step)
            for name, value in scores.items()
            if math.isfinite(value)
        ]
        client.log_batch(run_id, metrics=metrics)
    except Exception as error:  # whatever the library or the server raises
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        _LOG.warning("warning: the scores cannot be sent to the run's MLflow run (%s); they are in %s", reason, run_dir)
        return None
    return run_id


def _run_id(run_dir: Path) -> str | None:
    """Return the id of a folder's run on the server in use; None if it has none there."""
    runs_dir = run_dir.parent
    server = without_password(tracking_uri(runs_dir)) if os.environ.get("MLFLOW_TRACKING_URI") else "embedded"
    try:
        found = json.loads((run_dir / "mlflow.json").read_text(encoding="utf-8"))[server]["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
