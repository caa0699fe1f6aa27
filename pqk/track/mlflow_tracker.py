"""MLflow as a tracker: a run per record in the experiment `pqk`, by default in SQLite below outputs/mlflow."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from pqk.errors import PqkError
from pqk.track.track import Tracked, safe_key

EXPERIMENT = "pqk"
_LONGEST = 6000  # characters of a parameter that MLflow takes


class Tracker:
    """MLflow's client for a tracking URI; place: '' or a URI such as sqlite:///path.db or http://host:5000."""

    def __init__(self, place: str, root: Path) -> None:
        self._folder = root / "outputs" / "mlflow"
        self._own = not place
        self.uri = place or f"sqlite:///{self._folder / 'mlflow.db'}"

    def check(self) -> None:
        """Raises ImportError, or PqkError for a place that is no URI."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use over the network
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        if self.uri.startswith("sqlite:"):
            import alembic
            import sqlalchemy

            del alembic, sqlalchemy  # not part of mlflow-skinny
        del mlflow
        if "://" not in self.uri:
            raise PqkError(f"--track mlflow:{self.uri}: write the place as a URI, such as sqlite:///runs.db")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else it tells how it makes its tables

    def log(self, run: Tracked) -> str:
        """Writes a run with its parameters, metrics and files; one that fails in between is marked FAILED."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        if self._own:
            self._folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self.uri)
        known = client.get_experiment_by_name(EXPERIMENT)
        artifacts = (self._folder / "artifacts").as_uri() if self._own else None
        experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        now = int(1000 * time.time())
        found = client.create_run(experiment, run_name=run.name, tags={"pqk.run": run.group}).info.run_id
        try:
            metrics = [Metric(safe_key(name), value, now, 0) for name, value in run.metrics.items()]
            params = [Param(safe_key(name), value[:_LONGEST]) for name, value in run.params.items()]
            client.log_batch(found, metrics=metrics, params=params, tags=[RunTag("pqk.record", run.name)])
            for path in run.files:
                client.log_artifact(found, str(path))
        except BaseException:
            client.set_terminated(found, "FAILED")
            raise
        client.set_terminated(found, "FINISHED")
        return f"{self.uri}, experiment {EXPERIMENT}, run {found}"
