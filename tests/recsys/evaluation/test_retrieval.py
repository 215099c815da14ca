"""Recall and NDCG of a retrieval model against brute force: every row ranked with every item."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from recsys.build import build_job
from recsys.config import ContentSettings
from recsys.config.ranking import RetrievalSettings
from recsys.data.parquet.rows import ParquetRows
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.availability import later_items
from recsys.evaluation.evaluate import check_data
from recsys.evaluation.predict import evaluate, load_run
from recsys.evaluation.retrieval import count_above, retrieval_metrics
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import assert_same_metrics
from tests.recsys.em3_runs import ranks_of
from tests.recsys.ranking.backbone_runs import backbone_config

NUM_ITEMS = 150  # more than the deepest list
NUM_ROWS = {"train": 61, "valid": 24, "test": 33}
SEEN_ITEMS, LATER = " without seen items", " without later items"
CASES = [
    ("two_tower sampled", "qformer"),
    ("two_tower in_batch", "full"),
    ("two_tower", SEEN_ITEMS),
    ("two_tower", LATER),
]


def metrics_of(above: Tensor) -> dict[str, Any]:
    """Metrics of items that tie with none."""
    return retrieval_metrics(above, torch.zeros_like(above))


def test_recall_and_ndcg_of_places_written_out() -> None:
    metrics = metrics_of(torch.tensor([0, 9, 10, 60, 200]))
    gains = [1.0, 1 / math.log2(11), 1 / math.log2(12), 1 / math.log2(62)]
    reciprocal = [1.0, 1 / 10, 1 / 11, 1 / 61]
    for depth, count in ((10, 2), (50, 3), (100, 4)):
        assert metrics[f"mrr@{depth}"] == pytest.approx(sum(reciprocal[:count]) / 5)
        assert metrics[f"recall@{depth}"] == pytest.approx(count / 5)
        assert metrics[f"ndcg@{depth}"] == pytest.approx(sum(gains[:count]) / 5)
    assert metrics_of(torch.zeros(0))["recall@10"] is None


def test_no_list_has_an_item_that_the_catalogue_lacks_though_it_is_longer() -> None:
    items, targets, vectors = torch.tensor([2, 5]), torch.tensor([5, 7]), torch.eye(2)
    above = count_above(vectors.flip(0), vectors.flip(0), targets, items, vectors)
    metrics = retrieval_metrics(*above, depths=[3])
    assert [metrics[f"{name}@3"] for name in ("recall", "ndcg", "mrr")] == [0.5] * 3


def train_and_evaluate(rank: int, world_size: int, folder: Path) -> dict[Any, dict[str, Any]]:
    """The metrics that training ended with, and those of `evaluate`, by case."""
    ranks, reports = ranks_of(rank, world_size), {}
    for case in CASES:
        backbone, content = case
        config = backbone_config(
            folder,
            backbone,
            "qformer" if content in ("full", SEEN_ITEMS, LATER) else content,
            batch_size=7,
            epochs=1,
        )
        if content == SEEN_ITEMS:
            assert isinstance(config.ranking, RetrievalSettings)
            config = replace(config, ranking=replace(config.ranking, exclude_seen=True))
        if content == LATER:
            later: Any = {"available_from": "released", "row_time": "moment"}
            config = replace(config, ranking=replace(config.ranking, **later))
        if content == "full":  # history encoded with gradient, no bank
            assert isinstance(config.content, ContentSettings)
            history = replace(config.content.history, mode="full")
            config = replace(config, content=replace(config.content, history=history))
        run = folder / f"run {case}"
        metrics = train(config, str(folder / "data"), run, ranks)
        reports[case] = metrics["test"]
        assert_same_metrics(evaluate(run, None, "test", ranks, "cpu"), metrics["test"])
    return reports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    write_dataset(folder / "data", NUM_ROWS, num_items=NUM_ITEMS)
    # Two items that the catalogue does not have, one of which is ranked in the test split.
    file = folder / "data" / "items" / "part-0.parquet"
    ranked_item = pq.read_table(folder / "data" / "test")["item"][0].as_py()
    rows = pq.read_table(file)
    missing = pc.is_in(rows["item"], pa.array([ranked_item, (ranked_item + 1) % NUM_ITEMS]))
    rows = rows.append_column("released", released(rows["item"].to_numpy()))
    rows = rows.append_column("millis", pa.array([1_800_000_000_000] * rows.num_rows))
    pq.write_table(rows.filter(pc.invert(missing)), file, row_group_size=7)
    for file in folder.glob("data/[tv]*/*.parquet"):
        rows = pq.read_table(file)
        moments = pa.array(100 * np.arange(rows.num_rows) % 13, pa.int64()).cast(pa.timestamp("s"))
        is_positive = pc.equal(rows["liked"], 1)
        for name, is_null in (("positive", is_positive), ("negative", pc.invert(is_positive))):
            rows = rows.append_column(name, pc.if_else(is_null, None, moments))
        rows = rows.append_column("seconds", pa.array([1_800_000_000] * rows.num_rows))
        pq.write_table(rows.append_column("moment", moments), file, row_group_size=7)
    return folder


def released(items: np.ndarray) -> pa.Array:
    """Moments from which items are available, in another unit than those of rows, or none."""
    seconds = pa.array(10**9 * (items % 17) + 1, mask=items % 5 == 0)
    return seconds.cast(pa.timestamp("ns"))


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(train_and_evaluate, 2, folder)


def above_by_brute_force(folder: Path, run: Path) -> tuple[Tensor, np.ndarray]:
    """Logits of every liked test row with every item in the place of its own."""
    catalogue = pq.read_table(folder / "data" / "items")["item"].to_numpy()
    with joined_ranks("cpu") as ranks:
        job = load_run(run, None, ranks, "cpu")
        job.model.eval()
        excludes_seen = run.name.endswith(f"{SEEN_ITEMS}')")
        excludes_later = run.name.endswith(f"{LATER}')")
        moments = pq.read_table(folder / "data" / "test")["moment"]
        moments = moments.cast(pa.timestamp("s")).cast(pa.int64()).to_numpy()
        table = next(ParquetRows.of_split(job.root, "test", job.schema).read(0, NUM_ROWS["test"]))
        above, targets = [], []
        for row in np.flatnonzero(table["liked"].to_numpy() > 0):
            target = table["item"][row].as_py()
            out = table["history"][row].as_py() if excludes_seen else []
            if excludes_later:
                is_later = (catalogue % 5 > 0) & (catalogue % 17 > moments[row])
                out = catalogue[is_later]
                assert 0 < is_later.sum() < len(catalogue)
            items = np.unique(np.append(np.setdiff1d(catalogue, out), target))
            every = table.take(np.full(len(items), row))
            every = every.set_column(every.column_names.index("item"), "item", pa.array(items))
            loaded = iter([job.batch_builder()(every)])
            (batch,) = job.preparation(loaded, UnknownIds(job.schema), 0, training=False)
            with torch.no_grad():
                logits = job.model(batch)[1][1][:, 0].double()
            target_score = logits[int(np.flatnonzero(items == target)[0])]
            is_missing = target not in catalogue  # so that no search finds it
            num_above = len(catalogue) if is_missing else int((logits > target_score).sum())
            above.append(num_above)
            targets.append(target)
    assert len(catalogue) in above
    return torch.tensor(above), np.array(targets)


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_two_ranks_find_what_brute_force_finds(folder: Path, reports: Any, case: Any) -> None:
    above, targets = above_by_brute_force(folder, folder / f"run {case}")
    counts = np.bincount(pq.read_table(folder / "data" / "train")["item"], minlength=NUM_ITEMS)
    for report in (ran[case]["retrieval"] for ran in reports):
        assert report["catalogue"] == NUM_ITEMS - 2
        subsets = {
            "warm": counts[targets] >= 5,
            "cold": counts[targets] < 5,
            "unseen": counts[targets] == 0,
        }
        for name, rows in subsets.items():
            assert_same_metrics(report[name], metrics_of(above[torch.from_numpy(rows)]))
        all_rows = {name: report[name] for name in metrics_of(above)}
        assert_same_metrics(all_rows, metrics_of(above))
        assert 0 < report["recall@50"] < 1


def test_moments_that_cannot_be_compared_are_refused(folder: Path, reports: Any) -> None:
    del reports
    run = folder / f"run {CASES[-1]}"
    for settings, message in (
        ({"available_from": "text"}, "items.*column 'text': has no times or numbers"),
        ({"row_time": "price"}, "'price' of the rows and column 'released'.*not both times"),
        ({"row_time": "none"}, "column 'none'"),
        ({"row_time": "seconds", "available_from": "millis"}, "in s since 1970.* in ms; .*unit"),
    ):
        with joined_ranks("cpu") as ranks:
            job = load_run(run, None, ranks, "cpu")
            ranking = replace(job.config.ranking, **settings)  # type: ignore[arg-type]
            assert isinstance(ranking, RetrievalSettings)
            with pytest.raises(ValueError, match=message):
                later_items(job, ranking, job.rows("test"), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", ["none", "positive", "negative"])
def test_moments_that_no_search_can_read_end_a_job_before_it_begins(
    folder: Path, name: str
) -> None:
    """A moment is needed in rows that a search queries, those of label 1."""
    config = backbone_config(folder, "two_tower", "none", epochs=1)
    later: Any = {"available_from": "released", "row_time": name}
    config = replace(config, ranking=replace(config.ranking, **later))
    run = folder / f"refused {name}"
    with joined_ranks("cpu") as ranks:
        if name == "negative":
            check_data(build_job(config, str(folder / "data"), ranks))
            return
        problem = "missing" if name == "none" else "null"
        with pytest.raises(ValueError, match=rf"'{name}' is {problem}"):
            train(config, str(folder / "data"), run, ranks)
    assert not (run / "config.yaml").exists()
