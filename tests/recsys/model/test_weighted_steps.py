"""Steps on weighted rows against steps on rows that are there as often as their weight says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recsys.build import build_job
from recsys.data.parquet.rows import ParquetRows
from recsys.data.vocabularies import UnknownIds
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import (
    TABLES,
    Run,
    dense_gradients,
    full_table,
    ranks_of,
    round_tables,
    table_shards,
    table_weights,
)
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.weighted_data import table_of, write_null_labels, write_weighted

ROWS = 8  # of the step, before they are repeated


def step(
    rank: int, world_size: int, folder: Path, sizes: dict[tuple[str, str], int]
) -> dict[tuple[str, str], Run]:
    """One step of each backbone on a dataset's first rows, cut into equal parts for the ranks."""
    results = {}
    for (backbone, name), size in sizes.items():
        config = backbone_config(folder, backbone, "none")
        config = replace(config, ranking=replace(config.ranking, dropout=0.0))
        job = build_job(config, str(folder / name), ranks_of(rank, world_size))
        round_tables(table_weights(job))
        table = next(ParquetRows.of_split(job.root, "train", job.schema).read(0, size))
        rows = table.slice(rank * size // world_size, size // world_size)
        batches = iter([job.batch_builder()(rows)])
        (batch,) = job.preparation(batches, UnknownIds(job.schema), 0, training=True)
        loss, (_, logits, _) = job.model(batch)
        loss.backward()
        run = Run(gradients=[dense_gradients(job.em3)], tables=[table_shards(job)])
        run.losses, run.logits = [loss.detach()], [logits.detach()]
        results[backbone, name] = run
    return results


def assert_same_step(runs: list[Run], expected: list[Run]) -> None:
    """The same mean loss, dense gradients and, after their update, tables."""
    means = [torch.stack([run.losses[0] for run in side]).mean() for side in (runs, expected)]
    torch.testing.assert_close(means[0], means[1], atol=1e-6, rtol=1e-5)
    for name, gradient in expected[0].gradients[0].items():
        for run in runs:
            torch.testing.assert_close(run.gradients[0][name], gradient, atol=1e-6, rtol=1e-4)
    for name in TABLES:
        pair = [full_table(side, 0, name) for side in (runs, expected)]
        torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    write_weighted(folder)
    return folder


@pytest.fixture(scope="module")
def repeated(folder: Path) -> list[Run]:
    """The step on repeated rows, on one rank."""
    weights = table_of(folder / "weighted", "train")["times"].to_numpy()[:ROWS]
    assert weights[: ROWS // 2].sum() != weights[ROWS // 2 :].sum() and not weights.all()
    (results,) = run_on_ranks(step, 1, folder, {("mmoe", "repeated"): int(weights.sum())})
    return [results["mmoe", "repeated"]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_integer_weights_are_repeated_rows_in_loss_and_gradients(
    folder: Path, repeated: list[Run], world_size: int
) -> None:
    case = ("mmoe", "weighted")
    ranks = run_on_ranks(step, world_size, folder, {case: ROWS})
    assert_same_step([results[case] for results in ranks], repeated)


def test_a_null_label_has_no_part_in_the_loss_nor_in_gradients(folder: Path) -> None:
    """One step of two labels on one rank and on two, where ranks know a label of unlike rows."""
    data = write_null_labels(folder / "nulls")
    sizes = {(backbone, "nulls"): ROWS for backbone in ("mmoe", "dlrm")}
    alone, two_ranks = (run_on_ranks(step, world_size, folder, sizes) for world_size in (1, 2))
    rows = table_of(data, "train").slice(0, ROWS)
    for case in sizes:
        run = alone[0][case]
        assert_same_step([results[case] for results in two_ranks], [run])
        expected = torch.zeros(())
        for column, name in enumerate(("liked", "bought")):
            label = torch.tensor(rows[name].to_numpy())
            is_labelled = ~label.isnan()
            logits = run.logits[0][is_labelled, column]
            expected += F.binary_cross_entropy_with_logits(logits, label[is_labelled])
        assert rows["bought"].null_count
        torch.testing.assert_close(run.losses[0], expected)
