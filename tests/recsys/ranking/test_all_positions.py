"""One pass over whole histories against the slow reference, a row for each of their items."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from recsys.content.vectors import ContentVectors
from recsys.data.all_positions import (
    AllPositionRows,
    Summary,
    check_schema,
    summary_of,
    targets_before,
)
from recsys.data.batch import Batch, Negatives
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.row_source import Chunk, RowSource
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column
from recsys.model.losses import RetrievalLoss
from recsys.ranking.settings import TwoTowerSettings
from recsys.ranking.two_tower import TwoTower
from recsys.ranking.vectors import IDVectors, InputDimensions
from tests.recsys.ranking.ranking_inputs import CONTENT

NUM_ITEMS, LONGEST, ID_DIM = 20, 4, 4
SCHEMA = Schema(
    "item",
    "user",
    {
        "user": Column("id", num_embeddings=4),
        "item": Column("id", num_embeddings=NUM_ITEMS),
        "history": Column("sequence", shares="item", parallel=["age"]),
        "played": Column("label"),
    },
)
DIMENSIONS = InputDimensions(
    [3], ID_DIM, 0, 1, 1, ("user",), (), ("age",), group="user", num_items=NUM_ITEMS
)
# Items of each user in order of time; the second takes one twice, and the last has a single one.
EVENTS = [[3, 1, 4, 5, 9, 2, 6, 8], [7, 7, 12], [0, 11, 13, 14, 15], [16]]
Row = tuple[int, int, list[int]]  # user, item, history


def table_of(rows: list[Row]) -> pa.Table:
    users, items, histories = zip(*rows, strict=True)
    return pa.table(
        {
            "user": pa.array(users, pa.int64()),
            "item": pa.array(items, pa.int64()),
            "history": pa.array(histories, pa.list_(pa.int64())),
            "age": pa.array(
                [[0.5] * len(history) for history in histories], pa.list_(pa.float32())
            ),
            "played": pa.array([1.0] * len(rows), pa.float32()),
        }
    )


class TableRows(RowSource):
    """Rows of a table in chunks of three."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        starts = range(0, table.num_rows, 3)
        chunks = [Chunk("rows", min(3, table.num_rows - start), start) for start in starts]
        super().__init__(SCHEMA, chunks)

    def read_chunk(self, number: int) -> pa.Table:
        return self.table.slice(3 * number, self.chunks[number].num_rows)


def rows_in_time() -> list[Row]:
    """A row for each event, with up to `LONGEST` earlier ones of its user; users alternate."""
    rows: list[Row] = []
    for index in range(max(map(len, EVENTS))):
        for user, items in enumerate(EVENTS):
            if index < len(items):
                rows.append((user, items[index], items[max(index - LONGEST, 0) : index]))
    return rows


def summaries_of(source: RowSource, max_items: int) -> list[Summary]:
    tables = source.read_once(0, source.num_rows)
    return [summary_of(table, source, max_items) for table in tables]


def read(rows: list[Row]) -> AllPositionRows:
    source = TableRows(table_of(rows))
    return AllPositionRows(source, targets_before(summaries_of(source, LONGEST), len(rows)))


def targets_of(batch: Batch) -> list[Row]:
    """Each target of a batch, with the items of its history."""
    history = batch.history.items[batch.history.index].split(batch.history.lengths.tolist())
    items = [row.tolist() for row in history]
    return list(zip(batch.rows.groups.tolist(), batch.target.items.tolist(), items, strict=True))


def batch_of(source: RowSource) -> Batch:
    tables = list(source.read_once(0, source.num_rows))
    return BatchBuilder(SCHEMA, ["user"])(pa.concat_tables(tables))


def test_each_event_is_a_target_once_with_the_items_before_it_in_its_row() -> None:
    rows = rows_in_time()
    targets = targets_of(batch_of(read(rows)))
    assert sorted(row[:2] for row in targets) == sorted(row[:2] for row in rows)
    # The first user's eight events are the latest five, and three before.
    assert [row[2] for row in targets if row[0] == 0] == [
        *([3, 1, 4][:count] for count in range(3)),
        *([5, 9, 2, 6][:count] for count in range(5)),
    ]
    assert read(rows).num_rows == 5
    assert read(rows).fingerprint() == TableRows(table_of(rows)).fingerprint()


def test_a_row_whose_history_is_not_the_rows_before_it_stands_for_itself() -> None:
    rows = rows_in_time()
    (index,) = [number for number, row in enumerate(rows) if row[:2] == (2, 15)]
    user, item, history = rows[index]
    rows[index] = user, item, [*history[:-1], 19]  # an event that has no row
    targets = targets_of(batch_of(read(rows)))
    assert sorted(row[:2] for row in targets) == sorted(row[:2] for row in rows)
    assert rows[index] in targets


def test_every_row_is_read_alone_where_rows_are_not_in_order_of_time() -> None:
    rows = rows_in_time()[::-1]
    assert sorted(targets_of(batch_of(read(rows)))) == sorted(rows)


def reference(rows: AllPositionRows) -> Batch:
    """A row for each target, as a dataset could have them, in the order of those rows."""
    table = pa.concat_tables(rows.read_once(0, rows.num_rows)).to_pylist()
    alone: list[Row] = []
    for row in table:
        items = [*row["history"], row["item"]]
        alone += [(row["user"], item, items[:index]) for index, item in enumerate(items)]
    return batch_of(TableRows(table_of(alone)))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(settings: TwoTowerSettings, batch: Batch) -> list[Tensor]:
    """Queries, the loss, and its gradients by all parameters, ID vectors and content vectors."""
    torch.manual_seed(0)
    similar = replace(CONTENT, history=replace(CONTENT.history, similarity_features=True))
    model = TwoTower(settings, DIMENSIONS, similar)
    assert model.similarity is not None
    torch.nn.init.normal_(model.similarity.weights)
    modalities = len(CONTENT.modalities)
    users, items = random(4, 3, seed=1), random(NUM_ITEMS, ID_DIM, seed=2)
    content = random(NUM_ITEMS, (1 + modalities) * CONTENT.dim, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (users, items, content)]
    drawn = torch.arange(NUM_ITEMS)
    if settings.loss == "sampled_softmax":
        drawn = torch.tensor([1, 5, 5, 13, 18])
    log_q = random(NUM_ITEMS, seed=4)
    batch = replace(
        batch,
        target=replace(batch.target, log_q=log_q[batch.target.items]),
        negatives=Negatives(drawn, log_q[drawn]),
    )
    groups = batch.rows.groups
    ids = IDVectors(
        [users[groups]], items[batch.target.items], items[batch.history.items], True, items[drawn]
    )
    vectors, modality_vectors = content[:, : CONTENT.dim], content[:, CONTENT.dim :]
    modality_vectors = modality_vectors.unflatten(1, (modalities, CONTENT.dim))
    target, history = batch.target.items, batch.history.items
    read = vectors[target], vectors[history], modality_vectors[target], modality_vectors[history]
    towers = model(ids, ContentVectors(*read, vectors[drawn], modality_vectors[drawn]), batch)
    loss = RetrievalLoss(settings, [1.0])(towers, batch)
    gradients = torch.autograd.grad(loss, [*model.parameters(), *leaves], allow_unused=True)
    unused = [name for (name, _), grad in zip(model.named_parameters(), gradients) if grad is None]
    assert set(unused) <= {"encoder.layers.1.kvqu.bias"}, unused
    return [towers.query, loss, *(grad for grad in gradients if grad is not None)]


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax", "in_batch_softmax"])
@pytest.mark.parametrize("encoder", ["transformer", "hstu", "mean"])
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("in_item_tower", [False, True])
def test_one_pass_has_the_loss_and_gradients_of_a_row_for_each_position(
    encoder: str, loss: str, exclude_seen: bool, in_item_tower: bool
) -> None:
    settings = TwoTowerSettings(
        dropout=0.0,
        loss=loss,  # type: ignore[arg-type]
        history_encoder=encoder,  # type: ignore[arg-type]
        exclude_seen=exclude_seen,
        history_in_item_tower=in_item_tower,
        history_half_lives=[2.0] if in_item_tower else [],
        recent_items=LONGEST,
        sequence_dim=8,
        sequence_layers=3,
        tower_dim=8,
        mlp_units=[8],
        target_positions="all",
    )
    rows = read(rows_in_time())
    batch, slow = batch_of(rows), reference(rows)
    assert batch.history.full is not None and slow.history.full is None
    assert len(batch.history.full.index) < len(slow.history.index)
    for actual, expected in zip(results(settings, batch), results(settings, slow), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
        assert expected.abs().sum() > 0


def test_padding_rows_are_no_targets() -> None:
    rows = read(rows_in_time())
    tables = [*rows.read_once(0, rows.num_rows), rows.padding(2)]
    batch = BatchBuilder(SCHEMA, ["user"])(pa.concat_tables(tables))
    assert batch.rows.weights is not None
    assert batch.rows.weights.tolist() == [1.0] * sum(map(len, EVENTS)) + [0, 0]
    assert batch.history.lengths[-2:].tolist() == [0, 0]


def test_a_label_of_0_and_a_longer_history_than_one_pass_reads_are_refused() -> None:
    rows = rows_in_time()
    table = table_of(rows)
    labels = np.ones(len(rows), np.float32)
    labels[4] = 0
    source = TableRows(table.set_column(4, "played", pa.array(labels)))
    with pytest.raises(ValueError, match=r"rows row 4: column 'played' is not 1"):
        summaries_of(source, LONGEST)
    source = TableRows(table)
    with pytest.raises(ValueError, match=r"a history has 4 items.*raise ranking.recent_items"):
        summaries_of(source, LONGEST - 1)


def test_a_schema_whose_history_items_are_no_such_targets_is_refused() -> None:
    check_schema(SCHEMA)
    weighted = replace(SCHEMA, columns={**SCHEMA.columns, "times": Column("weight")})
    with pytest.raises(ValueError, match=r"a column of kind weight"):
        check_schema(weighted)
    assert ROW_POSITION not in SCHEMA.columns


@pytest.mark.parametrize(
    ("setting", "value"),
    [("loss", "pointwise"), ("query_features", ["hour"]), ("time_gaps", "age")],
)
def test_settings_that_read_the_moment_of_the_row_are_refused(setting: str, value: object) -> None:
    settings = TwoTowerSettings(loss="full_softmax", target_positions="all")
    settings.check("ranking")
    setattr(settings, setting, value)
    with pytest.raises(ValueError, match=rf"target_positions: all, but ranking.{setting} is"):
        settings.check("ranking")


def test_further_sequences_are_refused() -> None:
    settings = TwoTowerSettings(loss="full_softmax", target_positions="all")
    with pytest.raises(ValueError, match=r"further sequences"):
        TwoTower(settings, replace(DIMENSIONS, further_histories=("liked",)), None)
