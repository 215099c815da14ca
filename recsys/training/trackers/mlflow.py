"""MLflow through its own client: a server that MLFLOW_TRACKING_URI names, or files in the run.

`RUN/mlflow_run_id` keeps the identifier, so that a continued run is one run in MLflow, too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

EXPERIMENT = "recsys"  # unless MLFLOW_EXPERIMENT_NAME is set
RUN_ID = "mlflow_run_id"


class MLflowTracker:
    """Records settings as params and metrics by step. See `Tracker`.

    Raises:
        ValueError: MLflow is not installed.
    """

    def __init__(self, run: Path, settings: dict[str, Any], first_step: int) -> None:
        """Create the MLflow run with its params, or reopen it if the run continues."""
        # MLflow refuses its store of files, which needs no database, unless this is set.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise ValueError(
                "tracker mlflow: MLflow is not installed; run `pip install mlflow-skinny`, or "
                "choose another tracker"
            ) from error
        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI", (run / "mlflow").absolute().as_uri())
        self._client = MlflowClient(tracking_uri=uri)
        kept = run / RUN_ID
        if first_step and kept.exists():
            self.run_id = kept.read_text().strip()
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        self.run_id = self._client.create_run(number, run_name=run.absolute().name).info.run_id
        kept.write_text(f"{self.run_id}\n")
        params = [Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self.run_id, params=params)

    def log(self, values: dict[str, float], step: int) -> None:
        """Record metrics of a step."""
        now = int(1000 * time.time())
        # MLflow allows no `@` in names, as in recall@10.
        metrics = [
            self._metric(name.replace("@", "_at_"), float(value), now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the MLflow run as ended."""
        self._client.set_terminated(self.run_id)
