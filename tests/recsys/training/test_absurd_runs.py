"""Runs that train and are of no use: warned of at the start, and ended with an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.data.parquet.rows import ParquetRows
from recsys.data.row_source import RowSource
from recsys.data.schema import load_schema
from recsys.evaluation.model_selection import require_useful
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.command_runs import train_words


def test_unscaled_numbers_are_named_and_a_useless_model_ends_the_command_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    for file in data.glob("*/*.parquet"):
        table = pq.read_table(file)
        place = table.schema.get_field_index("price")
        if place >= 0:
            seconds = 1.7e9 + 1e7 * np.random.default_rng(0).random(table.num_rows)
            prices = pa.array(seconds, pa.float32())
            pq.write_table(table.set_column(place, "price", prices), file)

    assert main(train_words(data, tmp_path / "scaled")) == 0  # by default
    assert "standardized: 'price', 1.7" in capsys.readouterr().out
    assert main(train_words(data, run, "--ranking.scale_inputs", "false")) == 1
    printed = capsys.readouterr()
    assert "dense column 'price' goes from 1.7" in printed.out
    assert "log loss" in printed.err and "'price' (1.70003e+09 to 1.70997e+09)" in printed.err
    assert (run / "metrics.json").is_file() and (run / "checkpoints" / "best").is_dir()
    assert main(["evaluate", "--run", str(run), "--data", str(data), "--device", "cpu"]) == 0


def test_errors_far_above_those_of_a_constant_are_refused(tmp_path: Path) -> None:
    root = Location.of(str(write_dataset(tmp_path)))

    def require(metrics: dict[str, Any]) -> None:
        def rows() -> RowSource:
            return ParquetRows.of_split(root, "valid", load_schema(root))

        require_useful(metrics, "valid", rows, "")

    for loss in (None, 0.0, math.log(2), 1.38):
        require({"logloss": loss})
    for ratio in (None, 0.2, 2.0):
        require({"rmse": 9.0, "nrmse": ratio})
    for loss in (1.39, 2.5e31, math.inf, math.nan):
        with pytest.raises(ValueError, match="valid"):
            require({"logloss": loss})
    for useless in ({"logloss": 3.0}, {"rmse": 9.0, "nrmse": 2.1}):
        labels = {"clicked": {"logloss": 0.5}, "bought": useless}
        with pytest.raises(ValueError, match=r"valid.*'bought'"):
            require({"logloss": 0.5, "labels": labels})
