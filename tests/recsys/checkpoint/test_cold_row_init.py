"""Rows that no step has updated get the values of their rule, under every plan alike."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from recsys.checkpoint.run_folder import trained_counts
from recsys.data.item_frequency import ItemCounts
from tests.ranks import run_on_ranks
from tests.recsys.checkpoint.schema_runs import rewrite
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    assert_equal,
    begin,
    best_of,
    changed,
    ids_of,
    start,
    state_of,
    stored_state,
    write_ids,
    write_run,
)
from tests.recsys.em3_runs import ranks_of

NEW, WITHOUT_ITEM = 901, 902  # raw ids that the data has and the run has not


def rule(name: str, *argv: str) -> list[str]:
    return ["--embedding.tables", f"{{item: {{new_rows: {name}}}}}", *argv]


def with_new_items(folder: Path, out: Path) -> tuple[Path, list[int]]:
    """The run's data with two more ids at other places, one of them with content."""
    new_ids = [NEW, *reversed(ids_of(folder / "data")), WITHOUT_ITEM]

    def add(items: pa.Table) -> pa.Table:
        again = items.slice(0, 1)
        index = items.column_names.index("item")
        return pa.concat_tables(
            [items, again.set_column(index, "item", pa.array([NEW], pa.int64()))]
        )

    data = changed(folder, out, lambda schema: schema["columns"]["item"].update(num_embeddings=55))
    files = sorted((data / "items").glob("*.parquet"))
    assert len(files) == 1
    rewrite(data / "items", add)
    return write_ids(data, new_ids), new_ids


def moments_of(state: dict[str, Tensor]) -> Tensor:
    """The moments of the rows of the items' table."""
    (name,) = (key for key in state if re.match(r"optimizer\.tables.*\.item\.weight", key))
    return state[name]


def test_new_rows_have_the_mean_of_the_trained_ones_which_stay(
    multimodal: Path, tmp_path: Path
) -> None:
    data, new_ids = with_new_items(multimodal, tmp_path)
    old_rows = stored_state(best_of(multimodal))["item"]
    with start(multimodal, tmp_path / "new", *rule("mean"), data=data) as new:
        state, text = state_of(new.job), new.text
    table, trained = state["item"], moments_of(state) > 0
    assert not trained[[0, 54, new_ids.index(WITHOUT_ITEM)]].any()
    mean = table[trained].double().mean(dim=0).float()
    torch.testing.assert_close(table[~trained], mean.expand(int((~trained).sum()), -1))
    old = {raw: row for row, raw in enumerate(ids_of(multimodal / "data"))}
    for row in trained.nonzero().flatten().tolist():
        assert torch.equal(table[row], old_rows[old[new_ids[row]]])
    assert re.search(rf"new_rows: mean +the mean of {int(trained.sum())} trained rows", text)
    stored = json.loads((tmp_path / "new" / "warm_start.json").read_text())
    assert stored["differences"][-1]["what"] == "new_rows: mean"


@pytest.mark.parametrize("first_value", [0.0, 0.5])
def test_averages_of_a_new_row_begin_at_its_first_values(
    first_value: float, tmp_path: Path
) -> None:
    argv = [*WITHOUT_CONTENT, "--optimizer.ema_decay", "0.9", "--optimizer.ema_tables", "true"]
    folder = write_run(tmp_path, *argv)
    data, new_ids = with_new_items(folder, tmp_path / "further")
    first_rows = rule("zero")
    if first_value:
        file, vectors = tmp_path / "vectors.parquet", pa.array([[first_value] * 16])
        pq.write_table(pa.table({"id": [NEW], "vector": vectors}), file)
        first_rows = ["--embedding.tables", f"{{item: {{init_from: {{path: {file}}}}}}}"]
    with start(folder, tmp_path / "new", *argv, *first_rows, data=data, checkpoint="last") as new:
        state = state_of(new.job)
    assert state["optimizer.average.num_updates"] > 0
    (average,) = (
        value
        for name, value in state.items()
        if re.match(r"optimizer\.average.*\.item\.weight", name)
    )
    for table in (state["item"], average):
        assert (table[new_ids.index(NEW)] == first_value).all()


def test_a_run_keeps_the_counts_of_the_run_before_by_its_own_rows(
    multimodal: Path, tmp_path: Path
) -> None:
    (data, new_ids), run = with_new_items(multimodal, tmp_path), tmp_path / "new"
    with start(multimodal, run, data=data):
        pass
    ids = ids_of(multimodal / "data")
    total = ItemCounts.load(multimodal / "run" / "item_counts.npy")
    stored = ItemCounts.load(run / "item_counts_before.npy")
    assert dict(zip(stored.items.tolist(), stored.counts.tolist(), strict=True)) == {
        new_ids.index(ids[item]): count
        for item, count in zip(total.items.tolist(), total.counts.tolist(), strict=True)
    }
    ItemCounts.of_rows(stored.items[:2]).save(run / "item_counts.npy")  # of the new run itself
    assert trained_counts(run, 55).counts.tolist() == [*(stored.counts[:2] + 1), *stored.counts[2:]]


def test_by_the_rule_zero_rows_without_training_are_zeros(plain: Path, tmp_path: Path) -> None:
    argv = [*WITHOUT_CONTENT, "--embedding.tables", "{item: {new_rows: zero}}"]
    old_rows = stored_state(best_of(plain))["item"]
    with start(plain, tmp_path / "new", *argv) as new:
        state = state_of(new.job)
        assert re.search(r"new_rows: zero +zeros", new.text)
    trained = moments_of(state) > 0
    assert not trained.all()
    assert not state["item"][~trained].any()
    assert torch.equal(state["item"][trained], old_rows[trained])


def test_each_table_with_the_rule_mean_has_its_own(plain: Path, tmp_path: Path) -> None:
    tables = "{item: {new_rows: mean}, shop: {new_rows: mean}}"
    data = changed(
        plain, tmp_path, lambda schema: schema["columns"]["shop"].update(num_embeddings=9)
    )
    argv = [*WITHOUT_CONTENT, "--embedding.tables", tables]
    with start(plain, tmp_path / "new", *argv, data=data) as new:
        state = state_of(new.job)
        assert len(re.findall("new_rows: mean", new.text)) == 2
    trained = moments_of(state) > 0
    assert not trained.all()
    mean = state["item"][trained].double().mean(dim=0).float()
    torch.testing.assert_close(state["item"][~trained], mean.expand(int((~trained).sum()), -1))
    shops = state["shop"]
    torch.testing.assert_close(shops[5:], shops[:5].mean(dim=0).expand(4, -1))
    assert_equal({"shop": shops[:5]}, {"shop": stored_state(best_of(plain))["shop"]}, "shop")


def begin_on_rank(
    rank: int, world_size: int, folder: Path, data: Path, out: Path, argv: list[str]
) -> list[tuple[list[int], Tensor]]:
    job = begin(folder, out, ranks_of(rank, world_size), *argv, data=data).job
    table = job.model.state_dict()["embeddings.embeddings.item.weight"]
    return [
        (list(shard.metadata.shard_offsets), shard.tensor.detach())
        for shard in table.local_shards()
    ]


@pytest.mark.parametrize(
    ("world_size", "sharding"),
    [
        pytest.param(2, "row_wise", marks=pytest.mark.long),
        pytest.param(2, "column_wise", marks=pytest.mark.long),
        pytest.param(3, "table_wise", marks=pytest.mark.long),
    ],
)
def test_ranks_and_plans_get_the_same_rows(
    multimodal: Path, tmp_path: Path, world_size: int, sharding: str
) -> None:
    data, _ = with_new_items(multimodal, tmp_path)
    with start(multimodal, tmp_path / "one", *rule("mean"), data=data) as new:
        expected = state_of(new.job)["item"]
    argv = rule("mean", "--embedding.sharding", sharding)
    if sharding == "column_wise":  # moments of whole rows become those of each range of columns
        argv += ["--embedding.dim", "16"]
    results = run_on_ranks(begin_on_rank, world_size, multimodal, data, tmp_path / "many", argv)
    result = torch.full_like(expected, torch.nan)
    for (row, column), tensor in (shard for shards in results for shard in shards):
        result[row : row + len(tensor), column : column + tensor.shape[1]] = tensor
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_a_table_without_its_optimizer_state_is_refused(multimodal: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"tables\.item\.new_rows: mean .*set random"),
        start(multimodal, tmp_path / "new", *rule("mean"), optimizer=False),
    ):
        pass
