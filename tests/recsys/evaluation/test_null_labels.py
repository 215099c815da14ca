"""Labels that are null in some rows: read where the schema allows it, and left out of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.scores import check_same_rows, read_scores, scores_file
from recsys.storage.location import Location
from recsys.training.train import train
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import change_columns, table_of, write_null_labels, write_split


def rows_of(data: Path, split: str, **options: Any) -> ParquetRows:
    root = Location.of(str(data))
    return ParquetRows.of_split(root, split, load_schema(root), **options)


def test_each_label_has_the_metrics_of_the_rows_that_know_it(tmp_path: Path) -> None:
    data = write_null_labels(tmp_path / "data")
    config = backbone_config(tmp_path, "mmoe", "none", epochs=1, batch_size=20)
    with joined_ranks("cpu") as ranks:
        metrics = train(config, str(data), tmp_path / "run", ranks)
    bought = table_of(data, "test")["bought"]
    assert 0 < bought.null_count < len(bought)
    label_metrics = metrics["test"]["labels"]["bought"]
    assert label_metrics["num_samples"] == len(bought) - bought.null_count
    assert metrics["test"]["labels"]["liked"]["num_samples"] == len(bought)
    scores = read_scores(scores_file(tmp_path / "run", "test"))
    check_same_rows(scores, scores, "itself")
    is_known = ~np.isnan(scores.labels[:, 1])
    assert is_known.tolist() == bought.is_valid().to_pylist()
    expected = evaluation_report(
        scores.labels[is_known, 1],
        scores.logits[is_known, 1],
        scores.groups[is_known],
        scores.counts[is_known],
    )
    assert label_metrics == expected


def test_a_row_without_any_label_is_bad_and_a_null_of_another_label_as_before(
    tmp_path: Path,
) -> None:
    data = write_null_labels(tmp_path / "data")
    table = table_of(data, "test")
    bought = pa.array([None, *[1.0] * (table.num_rows - 1)], pa.float32())
    table = table.set_column(table.column_names.index("bought"), "bought", bought)
    liked = table.column_names.index("liked")
    write_split(data, "test", table.set_column(liked, "liked", bought))
    with pytest.raises(ValueError, match=r"'liked', row 0.*null"):
        list(rows_of(data, "test").read(0, table.num_rows))
    change_columns(data, liked={"kind": "label", "nullable": True})
    with pytest.raises(ValueError, match=r"row 0.*'liked', 'bought'"):
        list(rows_of(data, "test").read(0, table.num_rows))
    read = next(rows_of(data, "test", on_bad_row="skip").read(0, table.num_rows))
    assert (read[ROW_POSITION].to_numpy() < 0).tolist() == [True] + [False] * (table.num_rows - 1)
