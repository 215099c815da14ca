"""Statistics of neighbours beside brute force, by fold of users, and those that a run keeps."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.state import ADDED_TENSORS, model_state
from recsys.config import Config, NeighbourSettings, load_config
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.ranking.neighbours import FOLDS, PRIOR_VALUES, Neighbours
from recsys.storage.location import Location
from recsys.training.neighbour_statistics import (
    Events,
    events_of_rows,
    fill_statistics,
    gather_events,
    item_similarities,
    leading_factors,
    time_order_problem,
    user_deviations,
)
from recsys.training.train import train
from tests.datasets import impressions, write_dataset, write_parquet
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.data.raw_ids import TRAIN, write_raw_dataset
from tests.recsys.ranking.test_neighbours import WITH_ITEMS
from tests.recsys.training.changed_answers import set_column
from tests.recsys.training.continual.walk_runs import WITHOUT_CONTENT

NUM_USERS, NUM_ITEMS = 30, 9
SETTINGS = NeighbourSettings("liked", dim=3, taste_dim=3, significance=2.0)
SCHEMA = Schema(
    "item",
    "user",
    {
        "user": Column("id", num_embeddings=9),
        "item": Column("id", num_embeddings=3),
        "history": Column("sequence", shares="item", parallel=["stars"]),
        "liked": Column("label"),
    },
)


def random_events(seed: int = 0) -> Events:
    generator = np.random.default_rng(seed)
    users, items = np.nonzero(generator.random((NUM_USERS, NUM_ITEMS)) < 0.5)
    return of_one_time(users, items, generator.random(len(users)))


def of_one_time(users: np.ndarray, items: np.ndarray, values: np.ndarray) -> Events:
    return Events(users, items, values, np.zeros_like(users))


def scaled(events: Events) -> Events:
    return events._replace(values=(events.values - events.values.mean()) / events.values.std())


def by_brute_force(events: Events, by_value: bool) -> np.ndarray:
    """Similarities of all pairs of items, one after the other."""
    columns = [
        {
            user: value
            for user, item, value in zip(events.users, events.items, events.values)
            if item == other
        }
        for other in range(NUM_ITEMS)
    ]
    similarities = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for first, second in zip(*np.nonzero(~np.eye(NUM_ITEMS, dtype=bool))):
        a, b = columns[first], columns[second]
        common = a.keys() & b.keys()
        if not common:
            continue
        if by_value:
            norms = [1 + sum(value**2 for value in column.values()) for column in (a, b)]
            cosine = sum(a[user] * b[user] for user in common) / (norms[0] * norms[1]) ** 0.5
        else:
            cosine = len(common) / (len(a) * len(b)) ** 0.5
        similarities[first, second] = cosine * len(common) / (len(common) + SETTINGS.significance)
    return similarities


@pytest.mark.parametrize("by_value", [False, True])
def test_similarities_are_those_of_brute_force(
    by_value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.training.neighbour_statistics.ITEMS_PER_BLOCK", 4)
    events = random_events()
    actual = item_similarities(events, NUM_ITEMS, SETTINGS)[by_value].toarray()
    np.testing.assert_allclose(actual, by_brute_force(events, by_value), atol=1e-6)


def test_values_that_cancel_are_similar_by_users_alone() -> None:
    values = np.array([1.0, 1, 1, -1])
    events = of_one_time(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), values)
    by_users, by_values = item_similarities(events, 2, SETTINGS)
    np.testing.assert_allclose(by_users.toarray(), [[0, 0.5], [0.5, 0]])
    assert not by_values.toarray().any()


def test_a_pair_is_kept_if_one_is_a_near_neighbour_of_the_other() -> None:
    settings = NeighbourSettings("liked", neighbours_per_item=1, significance=2.0)
    every = by_brute_force(random_events(), by_value=True)
    nearest = np.abs(every) == np.abs(every).max(axis=1, keepdims=True)
    actual = item_similarities(random_events(), NUM_ITEMS, settings)[1].toarray()
    np.testing.assert_allclose(actual, every * (nearest | nearest.T), atol=1e-6)


def test_factors_are_the_closest_ones_of_their_width() -> None:
    similarity = item_similarities(random_events(), NUM_ITEMS, SETTINGS)[0]
    eigenvalues, vectors = np.linalg.eigh(similarity.toarray())
    largest = eigenvalues.clip(min=0) * (eigenvalues >= np.sort(eigenvalues)[-3])
    factors = leading_factors(similarity, 3)
    np.testing.assert_allclose(factors @ factors.T, vectors * largest @ vectors.T, atol=1e-6)


def test_many_items_have_nearly_the_factors_of_the_dense_solver() -> None:
    """Items of two tastes: the iteration finds the eigenvectors that stand out."""
    generator = np.random.default_rng(0)
    tastes = generator.random((2, 400)) < 0.15
    users, items = np.nonzero((generator.random((90, 400)) < 0.6) & tastes[np.arange(90) % 2])
    similarity = item_similarities(of_one_time(users, items, np.ones(len(users))), 400, SETTINGS)[0]
    eigenvalues, vectors = np.linalg.eigh(similarity.toarray())
    factors = leading_factors(similarity, 2)
    expected = vectors[:, -2:] * eigenvalues[-2:] @ vectors[:, -2:].T
    np.testing.assert_allclose(factors @ factors.T, expected, atol=1e-4)


def test_each_fold_has_the_statistics_of_the_other_users() -> None:
    events, neighbours = random_events(), Neighbours(SETTINGS, WITH_ITEMS, None)
    fill_statistics(neighbours, events, SETTINGS)
    deviations = user_deviations(scaled(events), SETTINGS)
    for fold in range(FOLDS + 1):
        other_folds = events.users % FOLDS != fold
        items = events.items[other_folds]
        sums = np.bincount(items, deviations[other_folds], NUM_ITEMS)
        torch.testing.assert_close(neighbours.value_sums[:, fold], torch.tensor(sums).float())
        counts = torch.tensor(np.bincount(items, minlength=NUM_ITEMS)).float()
        torch.testing.assert_close(neighbours.value_counts[:, fold], counts)
        subset = events._replace(values=deviations).take(other_folds)
        similarities = item_similarities(subset, NUM_ITEMS, SETTINGS)
        for name, similarity in zip(("cooccurrence", "taste"), similarities):
            expected = leading_factors(similarity, 3)
            actual = getattr(neighbours, name)[:, fold].float().numpy()  # taste is in float16
            np.testing.assert_allclose(actual @ actual.T, expected @ expected.T, atol=1e-3)


def test_each_block_has_the_statistics_of_the_rows_before_it() -> None:
    """Also of a user's other events: the means of users are those of that time."""
    events = random_events()
    events = events._replace(blocks=np.random.default_rng(1).integers(-1, FOLDS, len(events.users)))
    neighbours = Neighbours(SETTINGS, WITH_ITEMS, None)
    neighbours.block_starts[:] = torch.arange(FOLDS)
    fill_statistics(neighbours, events, SETTINGS)
    for block in range(FOLDS + 1):
        subset = scaled(events).take(events.blocks < block)
        deviations = user_deviations(subset, SETTINGS)
        sums = np.bincount(subset.items, deviations, NUM_ITEMS)
        torch.testing.assert_close(neighbours.value_sums[:, block], torch.tensor(sums).float())
        similarity = item_similarities(subset._replace(values=deviations), NUM_ITEMS, SETTINGS)[0]
        expected = leading_factors(similarity, 3)
        actual = neighbours.cooccurrence[:, block].numpy()
        np.testing.assert_allclose(actual @ actual.T, expected @ expected.T, atol=1e-5)


def test_a_deviation_is_from_the_mean_of_the_user() -> None:
    events = of_one_time(np.array([1, 1, 2]), np.array([0, 1, 0]), np.array([1.0, 0.7, 0.1]))
    deviations = (np.array([1.0, 0.7, 0.1]) - 0.6) / events.values.std()
    means = deviations[:2].sum() / (2 + PRIOR_VALUES), deviations[2] / (1 + PRIOR_VALUES)
    expected = deviations - [means[0], means[0], means[1]]
    np.testing.assert_allclose(user_deviations(scaled(events), SETTINGS), expected)


def test_an_event_counts_once_in_however_many_histories() -> None:
    rows = pa.table(
        {
            "user": [1, 3, 1, 2],
            "history": pa.array([[0], [0, 2], [0, 1], []], pa.list_(pa.int64())),
            "stars": pa.array([[1.0], [0.0, 0.7], [1.0, 0.5], []], pa.list_(pa.float32())),
        }
    )
    events = events_of_rows(rows, SCHEMA, NeighbourSettings("stars"))
    assert events.users.tolist() == [1, 1, 3, 3]
    assert events.items.tolist() == [0, 1, 0, 2]
    np.testing.assert_allclose(events.values, [1.0, 0.5, 0.0, 0.7], rtol=1e-6)
    assert events_of_rows(rows, SCHEMA, NeighbourSettings()).values.tolist() == [1.0] * 4


def test_an_event_is_of_the_first_block_that_has_it() -> None:
    rows = pa.table(
        {
            "user": [1, 1, 1, 2],
            "history": pa.array([[], [0], [0, 1], [0]], pa.list_(pa.int64())),
            "stars": pa.array([[], [0.25], [0.75, 0.5], [1.0]], pa.list_(pa.float32())),
            ROW_POSITION: [0, 1, 2, 3],
        }
    )
    settings, starts = NeighbourSettings("stars"), np.array([0, 1, 2, 2, 3])
    events = events_of_rows(rows, SCHEMA, settings, starts)
    assert events.blocks.tolist() == [1, 3, 4] and events.values.tolist() == [0.25, 0.5, 1.0]
    earlier = events_of_rows(rows, SCHEMA, settings, starts[:0])
    assert earlier.blocks.tolist() == [-1] * 3
    assert Events.joined([events, earlier]).blocks.tolist() == [-1] * 3


def test_unknown_ids_of_a_history_are_no_item() -> None:
    item = Column("id", num_embeddings=3, vocabulary=VocabularySettings("exact"))
    schema = replace(SCHEMA, columns={**SCHEMA.columns, "item": item})
    unknown = 2
    rows = pa.table(
        {
            "user": [1, 3],
            "history": pa.array([[unknown, 0, unknown], [1, unknown]], pa.list_(pa.int64())),
            "stars": pa.array([[0.1, 1.0, 0.2], [0.5, 0.3]], pa.list_(pa.float32())),
        }
    )
    events = events_of_rows(rows, schema, NeighbourSettings("stars"))
    assert [events.users.tolist(), events.items.tolist()] == [[1, 3], [0, 1]]
    assert events.values.tolist() == [1.0, 0.5]


def test_of_a_user_with_many_events_some_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.training.neighbour_statistics.MAX_EVENTS", 3)
    capped = random_events().capped()
    counts = np.bincount(capped.users)
    assert counts.max() == 3 and len(np.unique(capped.items)) == NUM_ITEMS


def statistics_of_ranks(rank: int, world_size: int, data: Path, out: Path) -> None:
    from tests.recsys.optimizer.test_optimizer_runs import ranks_of

    argv = ["--device", "cpu", "--batch_size", "16", *WITHOUT_CONTENT, "--epochs", "1"]
    argv += ["--neighbours", "{values: history_liked, dim: 4, taste_dim: 4}"]
    train(load_config(TINY, argv), str(data), out, ranks_of(rank, world_size))


def write_times(data: Path, times: np.ndarray) -> None:
    """Adds a column `time` to the training rows, in the order of their files."""
    start = 0
    for file in sorted((data / "train").glob("*.parquet")):
        rows = pq.read_table(file)
        times_of_file = pa.array(times[start : start + rows.num_rows])
        write_parquet(file, rows.append_column("time", times_of_file), row_group_size=11)
        start += rows.num_rows


@pytest.mark.parametrize("in_order", [True, False])
def test_two_ranks_have_the_statistics_of_one(tmp_path: Path, in_order: bool) -> None:
    data = write_dataset(tmp_path / "data", num_users=23)
    if in_order:
        write_times(data, np.arange(60) // 2)
    states = []
    for world_size in (1, 2):
        out = tmp_path / f"run_{world_size}"
        run_on_ranks(statistics_of_ranks, world_size, data, out)
        with joined_ranks("cpu") as ranks:
            job = load_run(out, str(data), ranks, "cpu")
            assert job.em3.neighbours is not None
            older_release = model_state(job, dict.fromkeys(model_state(job).keys() - ADDED_TENSORS))
            assert model_state(job).keys() - older_release.keys() == ADDED_TENSORS
            states.append(
                {name: value.clone() for name, value in job.em3.neighbours.named_buffers()}
            )
    starts = [0, 12, 24, 36, 48] if in_order else [-1] * FOLDS
    assert states[0]["block_starts"].tolist() == states[1]["block_starts"].tolist() == starts
    for name in ("cooccurrence", "taste", "value_sums", "value_counts", "value_mean"):
        assert states[0][name].any()
        torch.testing.assert_close(states[0][name], states[1][name])
    assert any(states[0]["blend.weight"][0, 1:] != 0)  # fitted to validation rows


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        (np.r_[0:40, 39:58, 60], None),
        (np.r_[0:40, 38:58], "part-1.parquet row 9 and .*part-1.parquet row 10: .* descends"),
        (None, "column 'time' is missing"),
    ],
)
def test_rows_that_are_in_no_order_of_time_read_statistics_of_other_users(
    tmp_path: Path, times: np.ndarray | None, problem: str | None
) -> None:
    root = Location.of(write_dataset(tmp_path / "data"))
    if times is not None:
        write_times(tmp_path / "data", times)
    reason = time_order_problem(ParquetRows.of_split(root, "train", load_schema(root)), "time")
    assert (reason is None) == (problem is None)
    assert problem is None or re.search(problem, reason or "")


def events_of_ranks(rank: int, world_size: int, data: Path) -> Events:
    from tests.recsys.optimizer.test_optimizer_runs import ranks_of

    root, ranks = Location.of(data), ranks_of(rank, world_size)
    job_fields = {"config": Config(), "root": root, "schema": load_schema(root), "ranks": ranks}
    job: Any = SimpleNamespace(**job_fields)
    return gather_events(job, NeighbourSettings("history_liked"), ["valid", "train"])


def test_of_differing_values_the_first_by_folder_counts_on_any_number_of_ranks(
    tmp_path: Path,
) -> None:
    """A user of the second half of one folder, and of the first half of the other."""
    data = write_dataset(tmp_path / "data", {})
    for folder, users, value in (("valid", [1, 2], 1.0), ("train", [2, 1], 0.0)):
        rows = impressions(2, 3, 4, np.random.default_rng(0))
        columns = {"user": users, "history": [[3], [3]], "history_liked": [[value], [value]]}
        for name, values in columns.items():
            rows = set_column(rows, name, pa.array(values, rows.schema.field(name).type))
        write_parquet(data / folder / "part-0.parquet", rows)
    for world_size in (1, 2):
        events = run_on_ranks(events_of_ranks, world_size, data)[0]
        assert [column.tolist() for column in events] == [[1, 2], [3, 3], [1.0, 1.0], [0, 0]]


def test_rows_without_a_user_are_other_users_in_each_folder(tmp_path: Path) -> None:
    hashes = dict.fromkeys(("user", "item", "words"), "{kind: hash}")
    data = write_raw_dataset(tmp_path / "data", **hashes)
    rows = {name: values[:2] for name, values in TRAIN.items()}
    rows |= {"user": [None, "ann"], "history": [[7], [7]], "history_liked": [[1.0], [1.0]]}
    for folder in ("train", "valid"):
        write_parquet(data / folder / "part-0.parquet", pa.table(rows))
    events = run_on_ranks(events_of_ranks, 1, data)[0]
    assert len(np.unique(events.users)) == len(events.users) == 3  # ann, and one in each folder
