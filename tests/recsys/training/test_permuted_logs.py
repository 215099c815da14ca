"""Permuting labels of the test rows of logs of people changes no score, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.config import load_config
from recsys.data.events.prepare import prepare_events
from recsys.distributed.ranks import joined_ranks
from recsys.training.train import train
from tests.recsys.data.events.logs import log_of_people
from tests.recsys.training.changed_answers import set_column
from tests.recsys.training.test_permuted_labels import scores_by

CONFIG = "recsys/recipes/id_only.yaml"
EVENTS = {
    "events": {"play": {"path": "log.parquet"}},
    "labels": {"played": {"action": "play"}},
    "negatives": {"per_positive": 2, "by": "popularity"},
    "histories": {"history": {"length": 10, "parallel": {"history_age": "age"}}},
    "counts": {"plays_of_item": {"of": "item"}, "plays_of_month": {"of": "item", "within": "30d"}},
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["ifdb", "retail"])
def test_labels_of_the_test_rows_of_a_log_change_no_score(name: str, tmp_path: Path) -> None:
    pq.write_table(log_of_people(name, 60), tmp_path / "log.parquet")
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(EVENTS))
    first, other = tmp_path / "first", tmp_path / "other"
    prepare_events(tmp_path / "events.yaml", first)
    shutil.copytree(first, other)
    (file,) = (other / "test").glob("*.parquet")
    rows = pq.read_table(file)
    permuted = np.random.default_rng(0).permutation(rows["played"].to_numpy())
    pq.write_table(set_column(rows, "played", pa.array(permuted, pa.float32())), file)
    scores = []
    for data in (first, other):
        config = load_config(CONFIG, ["--device", "cpu", "--epochs", "1"])
        with joined_ranks("cpu") as ranks:
            train(config, str(data), tmp_path / f"run_{data.name}", ranks)
        scores.append(scores_by(tmp_path / f"run_{data.name}", "test", data))
    assert len(scores[0]) == len(rows) and np.std(scores[0]) > 0
    assert np.array_equal(*scores)
