"""Whatever `prepare events` writes, `train`, `predict`, `export` and the scorer accept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from recsys.config import Config, load_config
from recsys.config.server import Limits
from recsys.data.events.prepare import prepare_events
from recsys.diagnostics.dataset.command import explain_data
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import predict
from recsys.serving.export import export_run
from recsys.serving.package import REQUEST
from recsys.serving.scorer import Scorer
from recsys.serving.server.input_columns import InputColumns, ScoreArguments
from recsys.serving.server.protocol import RankRequest, parse_message
from recsys.training.train import train
from tests.recsys.command_runs import ROOT
from tests.recsys.data.events.generated import LABELS, write_case

FEW = settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # an example takes seconds
    suppress_health_check=list(HealthCheck),
)
SETTINGS = {
    "epochs": "1",
    "batch_size": "16",
    "validations_per_epoch": "1",
    "best_model_by": "auc",
    "embedding.dim": "4",
    "ranking.ensemble_members": "1",
    "ranking.mlp_units": "[4]",
    "device": "cpu",
}


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with joined_ranks("cpu") as ranks:
        yield ranks


def tiny_config() -> Config:
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    return load_config(ROOT / "recsys" / "recipes" / "id_only.yaml", words)


@FEW
@given(data=st.data())
def test_a_prepared_dataset_is_trained_predicted_exported_and_scored(
    alone: Ranks, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        round_trip(Path(folder), data.draw, alone)


def round_trip(folder: Path, draw: Callable[[st.SearchStrategy], object], ranks: Ranks) -> None:
    data, run, package = folder / "data", folder / "run", folder / "package"
    prepare_events(write_case(folder, draw), data)
    explain_data(str(data))
    labels = {split: first_labels(data / split) for split in ("train", "valid")}
    assume(all(values == {0, 1} for values in labels.values()))  # AUC chooses the model
    train(tiny_config(), str(data), run, ranks)
    predict(run, [str(data / "test")], folder / "out.parquet", None, ranks, "cpu")
    export_run(run, package, "fp32", ranks)
    check_package(package, pq.read_table(folder / "out.parquet"))


def check_package(package: Path, predictions: pa.Table) -> None:
    """Compare answers to JSON requests with predictions, and the metadata with the file's types."""
    scorer = Scorer.load(package)
    columns = InputColumns(scorer, json.loads((package / REQUEST).read_text()))
    for row in predictions.slice(0, 10).to_pylist():
        body = {
            "user": {name: row[name] for name in columns.user},
            "history": {name: row[name] for name in columns.history},
            "candidates": [row[columns.item]],
        }
        request = parse_message(RankRequest, json.dumps(body).encode())
        arguments = ScoreArguments(request.user, request.history, request.candidates)
        columns.check(arguments, Limits())
        scores = scorer.score(arguments.user, arguments.history, arguments.candidates)
        expected = [row[f"prediction_{label}"] for label in scorer.labels]
        np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)
    for described in columns.metadata():
        kind = predictions.schema.field(described["name"]).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        assert (described["datatype"] == "BYTES") == pa.types.is_string(kind), described


def first_labels(folder: Path) -> set[float]:
    table = pq.read_table(folder)
    label = next(name for name in table.column_names if name in LABELS)
    return set(table[label].to_pylist())
