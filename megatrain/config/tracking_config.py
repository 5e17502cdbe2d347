"""`tracking.*`: where metrics are sent. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class TrackingConfig:
    """Where metrics go, besides metrics.jsonl."""

    name: str = key("mlflow", "tracker", choices=("mlflow", "none"))
    experiment: str = key("megatrain", "MLflow experiment")
    register: bool = key(
        False, "register the model of a finished run in MLflow's model registry, with what it came from as tags"
    )
    flush_every_s: float = key(2.0, "seconds between batches sent to the MLflow server", above=0, maximum=1e7)
    system_metrics_every_s: float = key(
        10.0, "seconds between samples of CPU, memory, disk and GPU; 0 takes none", minimum=0, maximum=1e7
    )
    finish_timeout_s: float = key(
        30.0,
        "longest wait at the end of a run until the MLflow server has everything, in seconds",
        above=0,
        maximum=1e7,
    )
