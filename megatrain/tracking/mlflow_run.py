"""A run on the MLflow server: found or created in its experiment, with its tags, parameters, dataset and files.

mlflow_sender.py sends its metrics. Imports no torch.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatrain.config.flatten import flatten
from megatrain.resilience.atomic_file import write_atomically
from megatrain.tracking.mlflow import tracking_uri, without_password
from megatrain.tracking.mlflow_database import prepare_database
from megatrain.tracking.mlflow_store import plain
from megatrain.tracking.sweep_record import SweepRecord, is_sweep_folder

MAX_PARAM_LENGTH = 500
"""The longest parameter that older servers accept. The artifact config.yaml holds the full values."""
MAX_PARAMS = 100
"""MLflow's limit per request."""
SWEEP_ID = "megatrain.sweep"
"""The tag that identifies a sweep's own MLflow run."""


class ServerRun:
    """The MLflow run of a run's folder. `client` is there once it is connected.

    Every method may raise any MLflow error. All are idempotent: work already done is found on the server and skipped.
    """

    client: Any

    def __init__(self, info: dict[str, Any], settings: dict[str, Any], tell: Callable[..., None]) -> None:
        """`tell(warning=...)` sends the trainer a message for its user."""
        self.info, self.settings, self.tell = info, settings, tell
        self.run_dir = Path(info["run_dir"])
        self._lock: IO[bytes] | None = None
        self._refused: set[str] = set()

    def connect(self) -> Any:
        """Find the run named in mlflow.json or create one; then log its tags, parameters and dataset.

        Returns the MLflow run as it was found, before anything was logged.
        """
        from mlflow.entities import RunTag
        from mlflow.tracking import MlflowClient

        self._lock_run()
        runs_dir = self.run_dir.parent
        if os.environ.get("MLFLOW_TRACKING_URI"):
            self.client = MlflowClient(tracking_uri(runs_dir))
            run_id = self._find_or_create_run(None)
        else:
            artifacts = (runs_dir / "mlartifacts").as_uri()
            with exclusive(runs_dir / "mlflow.db.lock"):  # the first process creates the tables
                if warning := prepare_database(runs_dir / "mlflow.db", artifacts):
                    self.tell(warning=warning)
                self.client = MlflowClient(tracking_uri(runs_dir) + "?timeout=60")
                run_id = self._find_or_create_run(artifacts)
        run = self.client.get_run(run_id)
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in self._tags().items()])
        self.extra(run_id, "parameters", lambda: self._log_params(run_id, run.data.params, run.data.tags))
        self.extra(run_id, "place in its sweep", lambda: self._log_parent(run_id, run.info.experiment_id))
        if run.inputs is None or not run.inputs.dataset_inputs:
            self.extra(run_id, "dataset", lambda: self._log_dataset(run_id))
        self.log_files(run_id, "config.yaml")
        return run

    def extra(self, run_id: str, what: str, action: Callable[[], None]) -> None:
        """Send what the metrics do not depend on. Warn once if the server refuses it; raise if the server is away.

        An older server lacks some calls, and artifacts may lie where this machine cannot write.
        """
        try:
            action()
        except Exception as error:
            self.client.get_run(run_id)
            logging.getLogger("megatrain.tracking").exception("the run's %s: refused", what)
            if what not in self._refused:
                self._refused.add(what)
                reason = plain(str(error)) or type(error).__name__
                self.tell(warning=f"the run's {what} cannot be sent, the rest is: {reason}")

    def log_files(self, run_id: str, *names: str) -> None:
        """Send the files of these names in the run's folder that exist, as artifacts."""
        for path in (self.run_dir / name for name in names):
            if path.exists():
                self.extra(run_id, "files", partial(self.client.log_artifact, run_id, str(path)))

    def _lock_run(self) -> None:
        """Lock the run. Raises RuntimeError while the helper of an earlier start is still sending."""
        if self._lock is None:
            lock = open(self.run_dir / ".mlflow.lock", "ab")  # noqa: SIM115 (held until this process ends)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise RuntimeError("the helper of an earlier start of this run is still sending") from None
            self._lock = lock

    def _find_or_create_run(self, artifact_location: str | None) -> str:
        """Return the id of this run's MLflow run on this server.

        A start without a checkpoint continues the MLflow run only if the config is the same, as after a crash before
        the first checkpoint. With another config it creates a new MLflow run.
        """
        from mlflow.exceptions import MlflowException

        server = without_password(tracking_uri(self.run_dir.parent)) if artifact_location is None else "embedded"
        path = self.run_dir / "mlflow.json"
        known = self._known_runs(path)
        experiment_id = self._find_or_create_experiment(artifact_location)
        found, deleted = known.get(server), None
        if found is not None and (self.info["resumed_from_step"] is not None or found["config"] == self.info["config"]):
            try:
                if self.client.get_run(found["run_id"]).info.lifecycle_stage == "active":
                    self.client.update_run(found["run_id"], status="RUNNING")
                    return str(found["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            deleted = found["run_id"]
        run_id: str = self.client.create_run(experiment_id, run_name=self.info["run_name"]).info.run_id
        known[server] = {"run_id": run_id, "config": self.info["config"]}
        write_atomically(path, json.dumps(known, indent=1) + "\n")
        if deleted is not None:
            self.tell(warning=f"run {deleted} was deleted there; the new run {run_id} gets all steps")
        return run_id

    def _known_runs(self, path: Path) -> dict[str, Any]:
        """Return the runs in mlflow.json by server; none, with a warning, if the file is damaged."""
        try:
            known = json.loads(path.read_text())
            if all({"run_id", "config"} <= found.keys() for found in known.values()):
                return dict(known)
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            pass
        self.tell(warning=f"{path} is damaged; a new run is made there with all steps")
        return {}

    def _find_or_create_experiment(self, artifact_location: str | None) -> str:
        """Return the experiment's id. A deleted one is restored, because MLflow lets no other have its name."""
        name = self.settings["experiment"]
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            return str(self.client.create_experiment(name, artifact_location))
        if experiment.lifecycle_stage != "active":
            try:
                self.client.restore_experiment(experiment.experiment_id)
            except Exception as error:
                if self.client.get_experiment(experiment.experiment_id).lifecycle_stage == "active":
                    return str(experiment.experiment_id)  # another run of it was faster
                raise RuntimeError(
                    f"the experiment {name} was deleted there and could not be restored ({error}); restore it in "
                    "MLflow, or start again with another tracking.experiment"
                ) from error
            self.tell(
                warning=f"the experiment {name} was deleted there; it was restored with its runs, because MLflow "
                "keeps a deleted experiment's name (tracking.experiment=... names another)"
            )
        return str(experiment.experiment_id)

    def _log_parent(self, run_id: str, experiment_id: str) -> None:
        """Show a point of a sweep under the sweep's own run."""
        if parent := self._find_or_create_parent(experiment_id):
            self.client.set_tag(run_id, "mlflow.parentRunId", parent)

    def _find_or_create_parent(self, experiment_id: str) -> str | None:
        """Return the id of the MLflow run of this run's sweep; None for a run outside a sweep.

        The tag SWEEP_ID identifies it. Points that start together take the same lock, so only one creates it; on a file
        system without locks all choose the oldest. It only groups the points and is marked as finished at once, because
        nothing tells when the last point of a sweep has ended.
        """
        sweep = self.info["config"].get("run", {}).get("sweep")
        if sweep is None:
            return None
        folder = self.run_dir.parent / sweep
        if not is_sweep_folder(folder):
            self.tell(warning=f"{folder} is not a sweep's folder; the run is shown outside its sweep")
            return None
        tags = {SWEEP_ID: SweepRecord.load(folder).id, "mlflow.user": user() or "", "sweep_dir": str(folder)}
        tags["mlflow.source.name"], tags["mlflow.source.type"] = "megatrain train --multirun", "LOCAL"
        with exclusive(folder / ".mlflow.lock"):
            found = list(self.client.search_runs([experiment_id], f"tags.`{SWEEP_ID}` = '{tags[SWEEP_ID]}'"))
            parent = min(found, key=lambda one: (one.info.start_time, one.info.run_id), default=None)
            if parent is None:
                parent = self.client.create_run(experiment_id, run_name=sweep, tags=tags)
            if parent.info.status != "FINISHED":
                self.client.set_terminated(parent.info.run_id, "FINISHED")
        return str(parent.info.run_id)

    def _tags(self) -> dict[str, str]:
        info = self.info
        tags = {
            "mlflow.user": user(),
            "mlflow.source.name": "megatrain train",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": info["git_commit"],
            "git_commit": info["git_commit"],
            "host": info["host"],
            "world_size": info["world_size"],
            "device": info["device"],
            "layout": info["layout"],
            "engine": info["config"].get("engine", {}).get("name"),
            "run_dir": info["run_dir"],
        }
        return {name: str(value) for name, value in tags.items() if value not in (None, "")}

    def _log_params(self, run_id: str, known: dict[str, str], tags: dict[str, str]) -> None:
        """Log the parameters that the server lacks, and tags for those that a resume changed.

        MLflow refuses to change a parameter, so the new value becomes the tag `resume.<key>`.
        """
        from mlflow.entities import Param, RunTag

        wanted = {name: text(value) for name, value in flatten(self.info["config"]).items()}
        wanted |= {name: text(self.info[name]) for name in ("num_parameters", "flops_per_token")}
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
        changed = [
            RunTag(f"resume.{name}", value)
            for name, value in wanted.items()
            if name in known and (known[name] != value or f"resume.{name}" in tags)
        ]
        for start in range(0, len(changed), MAX_PARAMS):
            self.client.log_batch(run_id, tags=changed[start : start + MAX_PARAMS])

    def _log_dataset(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self.info["config"].get("data", {})
        name, fingerprint = data.get("name"), self.info["dataset_fingerprint"]
        if not name or not fingerprint:
            return
        # A mixture is in no folder: its sources are in the profile.
        is_mixture = data.get("kind") in ("mixture", "demo")
        place = {} if is_mixture else {"uri": str((Path(data.get("dir", "data")) / name).resolve())}
        dataset = Dataset(
            name=name,
            digest=fingerprint[:36],  # MLflow's limit; the profile holds the full fingerprint
            source_type="mixture" if is_mixture else "local",
            source=json.dumps(place),
            profile=json.dumps(self.info["dataset"] | {"fingerprint": fingerprint}),
        )
        inputs = [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])]
        self.client.log_inputs(run_id, datasets=inputs)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, created if missing; wait for other processes."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def user() -> str | None:
    """Return the user's name, or None if the system does not know it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return None


def text(value: Any) -> str:
    """Return a parameter's value as text, cut at MLflow's limit: strings as they are, everything else as JSON."""
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= MAX_PARAM_LENGTH else shown[: MAX_PARAM_LENGTH - 3] + "..."
