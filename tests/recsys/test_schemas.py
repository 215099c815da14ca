"""Schemas and backbones: packages, warm starts and walks give the numbers of `predict`.

By default each schema runs with one backbone, which no other schema has, and in the long suite with
two more. "items alone" has no history either, so that "no history" is of the long suite.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.partitions import ContinualFolder
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config
from recsys.config.ranking import RANKING_MODELS
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict
from recsys.evaluation.scores import read_scores
from recsys.model.losses import predictions
from recsys.serving import Scorer
from recsys.serving.export import export_run
from recsys.storage.location import Location
from recsys.training.continual.partitions import PartitionRange
from recsys.training.continual.walk import train_continually
from recsys.training.train import train
from tests.recsys.schema_runs import (
    PARTITIONS,
    SCHEMAS,
    SchemaCase,
    case_config,
    request_of,
    write_case,
)

UNFIT = {  # nothing to read of a user, no history for its encoder, several labels
    ("items alone", "two_tower"),
    ("items alone", "generative"),
    ("no history", "generative"),
    ("three labels, no number", "generative"),
}
PAIRS = [
    pytest.param(
        (schema, backbone),
        id=f"{schema}-{backbone}",
        marks=[pytest.mark.long] if shift or schema == "no history" else [],
    )
    for index, schema in enumerate(SCHEMAS)
    for number, backbone in enumerate(RANKING_MODELS)
    if (shift := (index + number) % len(RANKING_MODELS)) in (0, 3, 6)
    and (schema, backbone) not in UNFIT
]


@dataclass(frozen=True)
class SchemaRun:
    """A run over both partitions, and the folder of run and dataset."""

    case: SchemaCase
    config: Config
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def predicted(self, run: Path, rows: str) -> np.ndarray:  # [N, C]
        """Predictions of a run for rows of the dataset."""
        out = self.folder / f"{run.name}.parquet"
        with joined_ranks("cpu") as ranks:
            predict(run, [str(self.data / rows)], out, None, ranks, "cpu")
        table = pq.read_table(out)
        names = [name for name in table.column_names if name.startswith("prediction_")]
        return np.stack([table[name].to_numpy() for name in names], axis=1)


@pytest.fixture(scope="module", params=PAIRS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SchemaRun:
    schema, backbone = request.param
    folder, case = tmp_path_factory.mktemp("schema"), SCHEMAS[schema]
    schema_run = SchemaRun(case, case_config(folder, case, backbone), folder)
    write_case(schema_run.data, case)
    with joined_ranks("cpu") as ranks:
        train(schema_run.config, str(schema_run.data), folder / "run", ranks)
    return schema_run


def test_a_package_scores_as_predict(run: SchemaRun) -> None:
    package = run.folder / "package"
    with joined_ranks("cpu") as ranks:
        export_run(run.folder / "run", package, "fp32", ranks)
    scorer, rows = Scorer.load(package), pq.read_table(run.data / "test").to_pylist()

    scores = [scorer.score(**request_of(run.case, row)) for row in rows]

    expected = run.predicted(run.folder / "run", "test")
    np.testing.assert_allclose(np.concatenate(scores), expected, rtol=0, atol=1e-6)
    assert len(np.unique(expected[:, 0])) > len(rows) / 2
    example = json.loads((package / "request.json").read_text())
    np.testing.assert_allclose(scorer.score(**example), expected[:1], rtol=0, atol=1e-6)
    everything = [row["item"] for row in rows]
    together = scorer.score(**{**example, "candidates": everything})
    alone = [scorer.score(**{**example, "candidates": [item]}) for item in everything]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-6)
    assert np.isfinite(scorer.score(example["user"], (), everything)).all()


def test_a_warm_start_takes_all_of_a_run(run: SchemaRun) -> None:
    warm = run.folder / "warm"
    with joined_ranks("cpu") as ranks:
        train(run.config, str(run.data), warm, ranks, warm_start=WarmStart(run.folder / "run"))

    assert json.loads((warm / "warm_start.json").read_text())["differences"] == []
    assert (warm / "metrics.json").exists()


def test_a_partition_is_scored_as_the_run_before_predicts(run: SchemaRun) -> None:
    walk = ContinualFolder(run.folder / "walk")
    options = {"span": PartitionRange(), "warm_start": WarmStart(run.folder / "run")}
    with joined_ranks("cpu") as ranks:
        train_continually(run.config, str(run.data), walk.path, ranks, **options)

    losses = load_schema(Location.of(run.data), with_vocabularies=False).label_losses
    old_run = (run.folder / "run", walk.run_of(PARTITIONS[0]))
    for model, partition in zip(old_run, PARTITIONS):
        logits = torch.from_numpy(read_scores(walk.scores_of(partition)).logits)
        expected = run.predicted(model, f"train/{partition}")
        np.testing.assert_allclose(predictions(logits, losses), expected, rtol=0, atol=1e-6)
