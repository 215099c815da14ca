"""Projections that start at the principal components, against scikit-learn and across ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from recsys.config import ContentSettings, FusionSettings, HistorySettings, ModalitySettings
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import StoredFeatures
from recsys.content.encoders.pooling import mean_token
from recsys.content.projection_start import start_projections, whitening_map
from recsys.data.batch import ContentInput
from recsys.data.filesystem import Location
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.content_store import ContentStore, ItemTable
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks

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
    start_projections(branch, store, ranks, trained=trained if rank == 0 else None)
    content: ContentInput = store.gather(np.sort(store.items.ids))["clip"]
    projection = branch.projections["clip"]
    known = content.mask.any(dim=1)
    with torch.no_grad():
        projected: Tensor = mean_token(projection(content.values), content.mask)[known]
    return {"weight": projection.weight.detach(), "projected": projected}


def test_the_map_is_that_of_a_whitening_pca_up_to_signs() -> None:
    outputs = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    outputs = outputs * torch.arange(1, WIDTH + 1) + 3

    weight, bias = whitening_map(outputs, DIM, size=1.0)

    # scikit-learn divides by n - 1.
    expected = PCA(DIM, whiten=True).fit_transform(outputs.numpy()) * np.sqrt(50 / 49)
    assert (outputs @ weight.T + bias).abs().numpy() == pytest.approx(np.abs(expected), abs=1e-9)


def test_directions_without_variance_stay_small() -> None:
    outputs = torch.randn(50, 1) @ torch.randn(1, WIDTH)  # one direction only

    weight, bias = whitening_map(outputs, DIM, size=1.0)

    projected = outputs @ weight.T + bias
    assert projected[:, 0].std(correction=0) == pytest.approx(1.0, abs=1e-4)
    assert projected[:, 1:].abs().max() < 1e-2


def test_ranks_start_at_one_projection_that_gives_tokens_mean_zero_and_variance_one(
    tmp_path: Path,
) -> None:
    data = write_dataset(tmp_path / "data", num_items=40)

    first, second = run_on_ranks(started_branch, 2, data)

    assert torch.equal(first["weight"], second["weight"])
    assert first["projected"].mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(first["projected"].std(dim=0, correction=0), torch.ones(DIM))


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
