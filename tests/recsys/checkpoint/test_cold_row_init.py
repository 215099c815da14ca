"""Rows that no step has updated get the values of their rule, under every plan alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from embeddings.ridge import fit_ridge
from recsys.checkpoint import cold_row_init
from recsys.checkpoint.cold_row_init import trained_counts
from recsys.data.item_frequency import ItemCounts
from tests.ranks import run_on_ranks
from tests.recsys.checkpoint.schema_runs import rewrite
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    assert_equal,
    begin,
    begun,
    best_of,
    changed,
    ids_of,
    state_of,
    stored_state,
    write_ids,
)
from tests.recsys.em3_runs import ranks_of

NEW, WITHOUT_ITEM = 901, 902  # raw ids that the data has and the run has not
WARM_FROM = 2  # training rows, since the items of the tests have few


def rule(name: str, *words: str) -> list[str]:
    return ["--embedding.tables", f"{{item: {{new_rows: {name}}}}}", *words]


def with_new_items(folder: Path, out: Path) -> tuple[Path, list[int]]:
    """The run's data with two more ids at other places, one of them with content."""
    new_ids = [NEW, *reversed(ids_of(folder / "data")), WITHOUT_ITEM]

    def add(items: pa.Table) -> pa.Table:
        again = items.slice(0, 1)
        place = items.column_names.index("item")
        return pa.concat_tables(
            [items, again.set_column(place, "item", pa.array([NEW], pa.int64()))]
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


def counts_before(folder: Path, run: Path, new_ids: list[int]) -> np.ndarray:
    """The counts that a new run keeps of the run before, by its own rows."""
    ids, total = ids_of(folder / "data"), ItemCounts.load(folder / "run" / "item_counts.npy")
    stored = ItemCounts.load(run / "item_counts_before.npy")
    assert dict(zip(stored.items.tolist(), stored.counts.tolist(), strict=True)) == {
        new_ids.index(ids[item]): count
        for item, count in zip(total.items.tolist(), total.counts.tolist(), strict=True)
    }
    ItemCounts.of_rows(stored.items[:2]).save(run / "item_counts.npy")  # of the new run itself
    assert trained_counts(run, 55).counts.tolist() == [*(stored.counts[:2] + 1), *stored.counts[2:]]
    return stored.of(np.arange(55))


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_row_init, "COLD_BELOW", WARM_FROM)


def test_new_items_get_the_row_that_the_regression_gives_their_content(
    multimodal: Path, tmp_path: Path, low_limit: None
) -> None:
    data, new_ids = with_new_items(multimodal, tmp_path)
    before = stored_state(best_of(multimodal))["item"]
    with begun(multimodal, tmp_path / "new", *rule("content"), data=data) as new:
        state, words = state_of(new.job), new.words
    table, bank = state["item"], state["bank"][:, :-1]
    trained = moments_of(state) > 0
    has_item = torch.tensor(
        [row < len(new_ids) and new_ids[row] != WITHOUT_ITEM for row in range(55)]
    )
    counts = torch.from_numpy(counts_before(multimodal, tmp_path / "new", new_ids))
    learned = trained & has_item & (counts >= WARM_FROM)
    assert 4 < learned.sum() < trained.sum() < has_item.sum()
    fitted = fit_ridge(bank[learned], table[learned])
    assert fitted is not None
    is_cold = has_item & ~trained
    assert is_cold[0]
    torch.testing.assert_close(table[is_cold], fitted(bank[is_cold]).float(), rtol=1e-6, atol=1e-7)
    mean = table[trained].double().mean(dim=0).float()
    lacks_item = ~has_item & ~trained
    assert lacks_item[[54, new_ids.index(WITHOUT_ITEM)]].all()
    torch.testing.assert_close(table[lacks_item], mean.expand(int(lacks_item.sum()), -1))
    old = {raw: row for row, raw in enumerate(ids_of(multimodal / "data"))}
    for row in trained.nonzero().flatten().tolist():
        assert torch.equal(table[row], before[old[new_ids[row]]])
    assert re.search(
        rf"new_rows: content +{int(is_cold.sum())} made .* {int(learned.sum())} rows", words
    )
    stored = json.loads((tmp_path / "new" / "warm_start.json").read_text())
    assert stored["differences"][-1]["what"] == "new_rows: content"


def test_by_the_rule_zero_rows_without_training_are_zeros(plain: Path, tmp_path: Path) -> None:
    words = [*WITHOUT_CONTENT, "--embedding.tables", "{item: {new_rows: zero}}"]
    before = stored_state(best_of(plain))["item"]
    with begun(plain, tmp_path / "new", *words) as new:
        state = state_of(new.job)
        assert re.search(r"new_rows: zero +zeros", new.words)
    trained = moments_of(state) > 0
    assert not trained.all()
    assert not state["item"][~trained].any()
    assert torch.equal(state["item"][trained], before[trained])


def test_without_warm_items_and_by_the_rule_mean_new_rows_have_the_mean(
    multimodal: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_row_init, "COLD_BELOW", 1000)
    with begun(multimodal, tmp_path / "one", *rule("content")) as new:
        state = state_of(new.job)
        assert re.search(r"no trained item .* 1000 ", new.words)
    tables = "{item: {new_rows: mean}, shop: {new_rows: mean}}"
    data = changed(
        plain, tmp_path, lambda schema: schema["columns"]["shop"].update(num_embeddings=9)
    )
    words = [*WITHOUT_CONTENT, "--embedding.tables", tables]
    with begun(plain, tmp_path / "two", *words, data=data) as new:
        plain_state = state_of(new.job)
        assert len(re.findall("new_rows: mean", new.words)) == 2
    for filled in (state, plain_state):
        trained = moments_of(filled) > 0
        assert not trained.all()
        mean = filled["item"][trained].double().mean(dim=0).float()
        torch.testing.assert_close(filled["item"][~trained], mean.expand(int((~trained).sum()), -1))
    shops = plain_state["shop"]
    torch.testing.assert_close(shops[5:], shops[:5].mean(dim=0).expand(4, -1))
    assert_equal({"shop": shops[:5]}, {"shop": stored_state(best_of(plain))["shop"]}, "shop")


def begin_on_rank(
    rank: int, world_size: int, folder: Path, data: Path, out: Path, words: list[str]
) -> list[tuple[list[int], Tensor]]:
    cold_row_init.COLD_BELOW = WARM_FROM  # of this process
    job = begin(folder, out, ranks_of(rank, world_size), *words, data=data).job
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
    multimodal: Path, tmp_path: Path, low_limit: None, world_size: int, sharding: str
) -> None:
    data, _ = with_new_items(multimodal, tmp_path)
    with begun(multimodal, tmp_path / "one", *rule("content"), data=data) as new:
        expected = state_of(new.job)["item"]
    words = rule("content", "--embedding.sharding", sharding)
    if sharding == "column_wise":  # moments of whole rows become those of each range of columns
        words += ["--embedding.dim", "16"]
    results = run_on_ranks(begin_on_rank, world_size, multimodal, data, tmp_path / "many", words)
    result = torch.full_like(expected, torch.nan)
    for (row, column), piece in (shard for shards in results for shard in shards):
        result[row : row + len(piece), column : column + piece.shape[1]] = piece
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


def test_a_table_without_its_optimizer_state_is_refused(multimodal: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"tables\.item\.new_rows: content .*set random"),
        begun(multimodal, tmp_path / "new", *rule("content"), optimizer=False),
    ):
        pass
