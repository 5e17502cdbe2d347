"""Register a run's model in MLflow's model registry, with what it came from as tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def register_model(client: Any, run_id: str, name: str, tags: Mapping[str, Any]) -> None:
    """Register the model of a finished run as a version of the model `name`, unless it is one already.

    `tags` are those of `checkpoint/lineage.py`; its `checksum` tells versions apart. Raises what MLflow raises.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    if any(version.tags.get("checksum") == tags["checksum"] for version in versions):
        return
    given = {key: str(value) for key, value in tags.items() if value not in (None, "")}
    client.create_model_version(name, source=str(tags["checkpoint"]), run_id=run_id, tags=given)
