"""Tables with an exact map that `schema.yaml` gives too few rows grow, and a run keeps its rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.prepare import prepare_vocabularies
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import evaluate
from recsys.training.train import train
from tests.recsys.checkpoint.schema_runs import rewrite
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    changed,
    config_of,
    ids_of,
    last_of,
    start,
    state_of,
    stored_state,
    write_ids,
    write_run,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("plain"), *WITHOUT_CONTENT)


def test_train_enlarges_a_table_and_the_run_keeps_its_rows_when_ids_are_added(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = changed(
        plain, tmp_path, lambda schema: schema["columns"]["item"].update(num_embeddings=9)
    )
    count, run, config = len(ids_of(data)), tmp_path / "run", config_of(plain, *WITHOUT_CONTENT)
    rows = count + 1 + count // 4
    with joined_ranks("cpu") as ranks, caplog.at_level("INFO"):
        train(config, str(data), run, ranks)
        metrics = evaluate(run, str(data), "test", ranks, "cpu")
    line = f"table 'item' has {rows} rows: num_embeddings of schema.yaml, 9, is too few for {count}"
    assert caplog.text.count(line) == 1
    assert load_run_schema(run).grown == {"item": 9}

    rewrite(data / "train", lambda table: _with_items(table, list(range(900, 920))))
    prepare_vocabularies(str(data))  # more ids than the run's table has rows
    assert len(ids_of(data)) == count + 20 >= rows
    with joined_ranks("cpu") as ranks, caplog.at_level("INFO"):
        assert evaluate(run, str(data), "test", ranks, "cpu")["auc"] == metrics["auc"]
    assert f"{count + 20 - (rows - 1)} ids of 'item' came after the run's table was" in caplog.text


def _with_items(table: pa.Table, items: list[int]) -> pa.Table:
    """A table whose first rows are of other items."""
    items = items[: table.num_rows]
    column = pa.array([*items, *table["item"].to_pylist()[len(items) :]], table["item"].type)
    return table.set_column(table.column_names.index("item"), "item", column)


def test_a_warm_start_enlarges_a_table_and_rows_follow_their_ids(
    plain: Path, tmp_path: Path
) -> None:
    old_ids = ids_of(plain / "data")
    ids = [901, *reversed(old_ids), *range(902, 925)]
    data = write_ids(changed(plain, tmp_path, lambda schema: None), ids)
    rows = len(ids) + 1 + len(ids) // 4
    assert pq.read_metadata(data / "vocabulary" / "item.parquet").num_rows >= 40
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, data=data, checkpoint="last") as new:
        assert new.job.schema.limit("item") == rows
        assert f"40 rows and {len(old_ids)} ids before, {rows} and {len(ids)} now" in new.text
        state, old = state_of(new.job)["item"], stored_state(last_of(plain))["item"]
    assert len(state) == rows and torch.equal(state[-1], old[-1])  # of unknown ids
    for row, raw in enumerate(reversed(old_ids)):
        assert torch.equal(state[1 + row], old[old_ids.index(raw)])
