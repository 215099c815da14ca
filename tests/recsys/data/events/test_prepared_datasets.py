"""What `prepare events` writes, `train`, `predict`, `export` and the scorer accept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import Config, load_config
from recsys.config.server import ServerSettings
from recsys.diagnostics.dataset.command import explain_data
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict
from recsys.serving.export import export_run
from recsys.serving.package import REQUEST
from recsys.serving.scorer import Scorer
from recsys.serving.server.input_columns import InputColumns, ScoreArguments
from recsys.serving.server.protocol import RankRequest, parse_message
from recsys.training.train import train
from tests.recsys.command_runs import ROOT
from tests.recsys.data.events.test_events_bad_inputs import prepare, write_inputs

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


def tiny_config() -> Config:
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    return load_config(ROOT / "recsys" / "recipes" / "id_only.yaml", words)


def test_a_prepared_dataset_is_trained_predicted_exported_and_scored(tmp_path: Path) -> None:
    """Of features of every kind: ids, numbers, lists of ids, counts, and lists beside a history."""
    config = write_inputs(tmp_path)
    items = pq.read_table(tmp_path / "items.parquet")
    tags = pa.array([["a"], [], ["b", "a"], None, ["c"], ["b"], [None]])
    brands = pa.array(["x", "y", None, "z", "x", "y", "z"])
    items = items.set_column(1, "brand", brands).append_column("tags", tags)
    pq.write_table(items, tmp_path / "items.parquet")
    config["items"]["columns"]["tags"] = "ids"
    config["histories"]["viewed"]["parallel"] |= {"viewed_age": "age", "viewed_brand": "brand"}
    prepare(
        tmp_path,
        config
        | {
            "context": {"price": {"kind": "dense", "fill": 0.5}},
            "counts": {"item_views": {"of": "item", "actions": "view"}},
            "negatives": {"per_positive": 2},
            "split": {"at": [0.6, 0.8]},
        },
    )
    data, run, package = tmp_path / "data", tmp_path / "run", tmp_path / "package"
    explain_data(str(data))
    with joined_ranks("cpu") as ranks:
        train(tiny_config(), str(data), run, ranks)
        predict(run, [str(data / "test")], tmp_path / "out.parquet", None, ranks, "cpu")
        export_run(run, package, "fp32", ranks)
    check_package(package, pq.read_table(tmp_path / "out.parquet"))


def check_package(package: Path, predictions: pa.Table) -> None:
    """Compare answers to JSON requests with predictions, and the metadata with the file's types."""
    scorer = Scorer.load(package)
    columns = InputColumns(scorer, json.loads((package / REQUEST).read_text()))
    for row in predictions.slice(0, 10).to_pylist():
        body = {
            "user": {name: row[name] for name in columns.user if name not in columns.of_items},
            "history": {name: row[name] for name in columns.history},
            "candidates": {name: [row[name]] for name in (columns.item, *columns.of_items)},
        }
        request = parse_message(RankRequest, json.dumps(body).encode())
        arguments = ScoreArguments(request.user, request.history, request.candidates)
        columns.check(arguments, ServerSettings())
        scores = scorer.score(arguments.user, arguments.history, arguments.candidates)
        expected = [row[f"prediction_{label}"] for label in scorer.labels]
        np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)
        looked_up = [name for name in columns.history if scorer.schema.lookup_beside(name)]
        assert looked_up == ["viewed_brand"]
        history = {name: row[name] for name in columns.history if name not in looked_up}
        again = scorer.score(arguments.user, history, arguments.candidates)
        np.testing.assert_array_equal(again, scores)
    for described in columns.metadata():
        kind = predictions.schema.field(described["name"]).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        assert (described["datatype"] == "BYTES") == pa.types.is_string(kind), described
