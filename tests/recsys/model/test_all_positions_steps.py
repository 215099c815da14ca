"""Training at all positions: two ranks against one, and a run from begin to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.build import build_job
from recsys.config import Config, ContrastiveSettings
from recsys.data.all_positions import all_positions
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.predict import evaluate, load_run
from recsys.ranking.settings import TwoTowerSettings
from recsys.serving.retrieval import Retriever
from recsys.serving.retrieval.item_vectors import export_vectors
from recsys.training.train import train
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import (
    Run,
    dense_gradients,
    em3_config,
    full_table,
    ranks_of,
    round_tables,
    table_shards,
    table_weights,
)

NUM_USERS, NUM_ITEMS, LONGEST = 6, 12, 4
SCHEMA = """
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 6}
  item: {kind: id, num_embeddings: 12}
  history: {kind: sequence, shares: item, parallel: [age]}
  played: {kind: label}
items: {id: item, columns: {}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of users with 4 to 14 events; their last ones are test and valid."""
    folder = tmp_path_factory.mktemp("all_positions")
    rng = np.random.default_rng(0)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    for user in range(NUM_USERS):
        items = rng.integers(NUM_ITEMS, size=4 + 2 * user).tolist()
        for index, item in enumerate(items):
            history = items[max(index - LONGEST, 0) : index]
            split = {len(items) - 1: "test", len(items) - 2: "valid"}.get(index, "train")
            ages = [0.5] * len(history)
            row = {"user": user, "item": item, "history": history, "age": ages, "played": 1.0}
            splits[split].append(row)
    kinds = [("user", pa.int64()), ("item", pa.int64()), ("history", pa.list_(pa.int64()))]
    kinds += [("age", pa.list_(pa.float32())), ("played", pa.float32())]
    for split, rows in splits.items():
        (folder / "data" / split).mkdir(parents=True)
        table = pa.Table.from_pylist(rows, pa.schema(kinds))
        pq.write_table(table, folder / "data" / split / "part.parquet", row_group_size=5)
    (folder / "data" / "items").mkdir()
    items = pa.table({"item": pa.array(range(NUM_ITEMS), pa.int64())})
    pq.write_table(items, folder / "data" / "items" / "part.parquet")
    (folder / "data" / "schema.yaml").write_text(SCHEMA)
    return folder


LOSSES: dict[str, dict[str, Any]] = {
    "full_softmax": {"history_encoder": "transformer"},
    "in_batch_softmax": {"history_encoder": "hstu", "all_ranks": True},
}


def config_of(folder: Path, loss: Any, **settings: Any) -> Config:
    ranking = TwoTowerSettings(
        **LOSSES[loss],
        loss=loss,
        target_positions="all",
        recent_items=LONGEST,
        sequence_dim=8,
        tower_dim=8,
        mlp_units=[8],
        dropout=0.0,
        exclude_seen=True,
        depths=[2, 10],
    )
    no_contrastive = ContrastiveSettings(weight=0.0)
    fixed: dict[str, Any] = {"ranking": ranking, "contrastive": no_contrastive, "content": "none"}
    return em3_config(folder, **fixed, **settings)


def step(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Run, int]]:
    """One step of each loss on this rank's share of the rows, and its number of targets.

    As in training, a rank with fewer rows than the others has a padding row.
    """
    results = {}
    for loss_name in LOSSES:
        config = config_of(folder, loss_name)
        job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
        round_tables(table_weights(job))
        rows = all_positions(job.rows("train"), LONGEST, job.ranks)
        share = rows.share(rank, world_size)
        padding = rows.padding(-(-rows.num_rows // world_size) - (share[1] - share[0]))
        table = pa.concat_tables([*rows.read_once(*share), padding])
        batches = iter([job.batch_builder()(table)])
        (batch,) = job.preparation(batches, UnknownIds(job.schema), 0, training=True)
        loss, _ = job.model(batch)
        loss.backward()
        run = Run(gradients=[dense_gradients(job.em3)], tables=[table_shards(job)])
        run.losses = [loss.detach()]
        results[loss_name] = run, int((batch.rows.positions >= 0).sum())
    return results


def test_two_ranks_with_unlike_numbers_of_targets_step_as_one_does(folder: Path) -> None:
    (alone,) = run_on_ranks(step, 1, folder)
    ranks = run_on_ranks(step, 2, folder)
    for name, (expected, num_targets) in alone.items():
        runs, targets = zip(*(results[name] for results in ranks), strict=True)
        assert sum(targets) == num_targets == sum(2 + 2 * user for user in range(NUM_USERS))
        assert targets[0] != targets[1]
        mean = torch.stack([run.losses[0] for run in runs]).mean()
        torch.testing.assert_close(mean, expected.losses[0], atol=1e-6, rtol=1e-5)
        for parameter, gradient in expected.gradients[0].items():
            for run in runs:
                actual = run.gradients[0][parameter]
                torch.testing.assert_close(actual, gradient, atol=1e-6, rtol=1e-4)
        for table in ("user", "item"):
            pair = [full_table(side, 0, table) for side in ([*runs], [expected])]
            torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-5)


def trained(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run of two epochs, and of its evaluation by rows as any dataset has them."""
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    config = config_of(folder, "full_softmax", epochs=2, batch_size=2, best_model_by="ndcg")
    metrics = train(config, data, folder / "run", ranks)
    return [metrics, evaluate(folder / "run", None, "test", ranks, "cpu")]


def test_a_run_is_evaluated_by_its_rows_and_served(folder: Path) -> None:
    metrics, evaluated = run_on_ranks(trained, 2, folder)[0]
    assert metrics["train"]["steps"] == 2 * 3  # of eleven histories, two on each rank
    assert metrics["test"]["num_samples"] == NUM_USERS
    assert evaluated["retrieval"] == metrics["test"]["retrieval"]
    with joined_ranks("cpu") as ranks:
        job = load_run(folder / "run", None, ranks, "cpu")
        expected = score(job, split_interactions(job, "test"), with_queries=True)["queries"]
        export_vectors(folder / "run", folder / "vectors", None, "flat", ranks)
    tower = Retriever.load(folder / "vectors").tower
    assert tower is not None
    queries = [
        tower.query({"user": row["user"]}, {name: row[name] for name in ("history", "age")})
        for row in pq.read_table(folder / "data" / "test").to_pylist()
    ]
    torch.testing.assert_close(torch.from_numpy(np.stack(queries)), expected, rtol=0, atol=1e-5)
