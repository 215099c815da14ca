"""Projections start at principal components, and stay bounded on degenerate content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from recsys.config import (
    ContentSettings,
    FusionSettings,
    HistorySettings,
    ModalitySettings,
)
from recsys.content.branch import ContentBranch, Projection
from recsys.content.encoders.base import mean_token
from recsys.content.encoders.build import StoredFeatures
from recsys.content.item_vectors import init_from_components, init_projections, whitening_map
from recsys.data.batch import ContentInput
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.content_store import ContentStore, ItemTable
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.data.items.item_content import rewrite

DIM, WIDTH = 4, 6
CLIP = ModalitySettings(kind="feature", column="clip")


def started_branch(
    rank: int, world_size: int, data: Path, trained: ItemCounts | None = None
) -> dict[str, Any]:
    """Projection and projected mean tokens of all items that have the feature."""
    root = Location.of(str(data))
    store = ContentStore(ItemTable(root, load_schema(root)), {"clip": CLIP}, data / f"cache{rank}")
    store.build("clip")
    torch.manual_seed(rank)
    settings = ContentSettings(
        {"clip": CLIP}, DIM, FusionSettings(num_heads=2), HistorySettings(mode="full")
    )
    branch = ContentBranch({"clip": StoredFeatures(WIDTH)}, settings, None)
    device = torch.device("cpu")
    ranks = Ranks(rank, world_size, rank, world_size, device)
    init_projections(branch, store, ranks, trained=trained if rank == 0 else None)
    content: ContentInput = store.gather(np.sort(store.items.ids))["clip"]
    projection = branch.projections["clip"]
    is_present = content.mask.any(dim=1)
    with torch.no_grad():
        projected: Tensor = mean_token(projection(content.values), content.mask)[is_present]
    return {"weight": projection.weight.detach(), "projected": projected}


def test_the_map_is_that_of_a_whitening_pca_up_to_signs() -> None:
    outputs = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    outputs = outputs * torch.arange(1, WIDTH + 1) + 3

    weight, bias = whitening_map(outputs, DIM, size=1.0)

    # scikit-learn divides by n - 1.
    expected = PCA(DIM, whiten=True).fit_transform(outputs.numpy()) * np.sqrt(50 / 49)
    assert (outputs @ weight.T + bias).abs().numpy() == pytest.approx(np.abs(expected), abs=1e-9)


def test_a_projection_starts_from_items_with_training_rows_alone(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_items=40)
    items = pq.read_table(data / "items").sort_by("item").to_pylist()
    with_clip = [row["item"] for row in items if row["clip"] is not None]
    trained = ItemCounts(np.array(with_clip[:20]), np.ones(20, np.int64))

    first, second = run_on_ranks(started_branch, 2, data, trained)

    assert torch.equal(first["weight"], second["weight"])
    projected = first["projected"][:20]
    assert projected.mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(projected.std(dim=0, correction=0), torch.ones(DIM))


def three_kinds(n: int) -> np.ndarray:
    return np.arange(n)[:, None] % 3


def one_of_its_own(n: int) -> np.ndarray:
    return np.arange(n)[:, None] == n // 2


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, WIDTH))


def test_content_that_is_equal_for_most_items_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_dataset(tmp_path / "data")
    index, clip = 3, pa.array([[1.0] * WIDTH] * 30, pa.list_(pa.float32()))
    rewrite(data, lambda table: table.set_column(index, "clip", clip))

    with joined_ranks("cpu"):
        started_branch(0, 1, data)

    assert "'clip'" in caplog.text and "equal content" in caplog.text


# Features [n, WIDTH] of each case.
FEATURES: dict[str, Callable[[int], np.ndarray]] = {
    "constant": lambda n: np.full((n, WIDTH), 1234.567),
    "three values": lambda n: three_kinds(n) * 3 + np.full((n, WIDTH), 0.7),
    "duplicated columns": lambda n: np.repeat(normal(n)[:, :2] + 5, WIDTH // 2, axis=1),
    "one outlier": lambda n: normal(n) + 1e6 * one_of_its_own(n),
    "only an outlier": lambda n: 0.1 + 1e6 * one_of_its_own(n) * np.ones(WIDTH),
    "tiny variance": lambda n: 7.7 + 1e-7 * normal(n),
    "tiny numbers": lambda n: 1e-38 * normal(n),
    "huge numbers": lambda n: 1e36 * normal(n),
    "zero vectors": lambda n: np.zeros((n, WIDTH)),
    "rank 1": lambda n: normal(n)[:, :1] * np.arange(1, WIDTH + 1) + 100,
    "one constant column": lambda n: np.where(np.arange(WIDTH) == 0, 1e5, normal(n)),
}


@pytest.mark.parametrize("size", [1, 2, 5, 200])
@pytest.mark.parametrize("case", FEATURES)
def test_projected_outputs_are_bounded_at_the_start(case: str, size: int) -> None:
    torch.manual_seed(0)
    outputs = torch.from_numpy(FEATURES[case](size).astype(np.float32))
    for dim in (2, WIDTH, 16):
        projection = Projection(WIDTH, dim)
        with torch.no_grad():
            init_from_components(projection, outputs)
            projected = projection(outputs)
            unseen = projection(outputs.mean(dim=0) * 1.5)
        # Of n numbers of variance 1, the largest is at most the root of n.
        bound = 1 + size**0.5 if dim == 2 and size > 2 else 1 + 10 * (size * WIDTH) ** 0.5
        assert projected.abs().max() < bound, dim
        if case in ("constant", "zero vectors"):
            assert unseen.abs().max() < bound, dim
