"""Packages of several histories, and of numbers of wide range, score as `predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.predict import load_run
from recsys.serving import Scorer
from recsys.serving.retrieval import Retriever
from recsys.serving.retrieval.item_vectors import export_vectors
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.serving.serving_runs import HISTORY_COLUMNS, exported, requests
from tests.several_histories import write_several_histories

FURTHER = ("bought", "bought_shop", "bought_price", "searched")
COLUMNS = (*HISTORY_COLUMNS, "history_shop", *FURTHER)
FACTORS = {"price": 340.0, "history_liked": 50.0, "bought_price": 9e4}


def write_wide(folder: Path) -> Path:
    """Several histories with numbers of wide range in every column and list."""
    write_several_histories(folder)
    for file in folder.glob("[tv]*/*.parquet"):
        table = pq.read_table(file)
        for name, factor in FACTORS.items():
            column = table[name]
            values = [widened(value, factor) for value in column.to_pylist()]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, column.type))
        pq.write_table(table, file)
    return folder


def widened(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [widened(number, factor) for number in value]
    return None if value is None else value * factor


def test_scores_of_a_package_equal_those_of_predict(tmp_path: Path) -> None:
    data = write_wide(tmp_path / "data")
    package, predicted = exported(tmp_path, backbone_config(tmp_path, "din_dcn", "none"))
    scorer = Scorer.load(package)
    scores = [scorer.score(**request) for request in requests(data, COLUMNS)]
    np.testing.assert_allclose(np.concatenate(scores), predicted, rtol=0, atol=1e-6)
    with joined_ranks("cpu") as ranks:
        scaling = load_run(tmp_path / "run", None, ranks, "cpu").em3.scaling
    assert scaling is not None and scaling.is_scaled.all()
    assert set(scaling.names) == set(FACTORS)


def test_queries_of_a_user_tower_are_those_of_the_model(tmp_path: Path) -> None:
    """It is given the dense columns of the user alone."""
    data = write_wide(tmp_path / "data")
    schema = data / "schema.yaml"
    weight = "columns:\n  weight: {kind: dense, column: price, transform: [log1p]}\n"
    schema.write_text(schema.read_text().replace("columns:\n", weight, 1))
    config = backbone_config(tmp_path, "two_tower", "none")
    config = replace(config, ranking=replace(config.ranking, query_features=["price"]))  # type: ignore[call-arg]
    exported(tmp_path, config)
    with joined_ranks("cpu") as ranks:
        job = load_run(tmp_path / "run", None, ranks, "cpu")
        samples = split_interactions(job, "test")
        expected = score(job, samples, with_queries=True)["queries"]
        export_vectors(tmp_path / "run", tmp_path / "vectors", None, "flat", ranks)
    tower = Retriever.load(tmp_path / "vectors").tower
    assert tower is not None
    liked = [row["liked"] > 0 for row in pq.read_table(data / "test").to_pylist()]
    rows = [request for request, is_liked in zip(requests(data, COLUMNS), liked) if is_liked]
    queries = [tower.query(request["user"], request["history"]) for request in rows]
    torch.testing.assert_close(torch.from_numpy(np.stack(queries)), expected, rtol=0, atol=1e-5)
