"""Projections start at principal components, and stay bounded on degenerate content."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from recsys.build import Job, build_job
from recsys.config import (
    Config,
    ContentSettings,
    FusionSettings,
    HistorySettings,
    ModalitySettings,
    content_settings,
)
from recsys.content import projection_start
from recsys.content.branch import ContentBranch, Projection
from recsys.content.encoders.base import mean_token
from recsys.content.encoders.build import StoredFeatures
from recsys.content.projection_start import start_at_components, start_projections, whitening_map
from recsys.data.batch import ContentInput
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.content_store import ContentStore, ItemTable
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.evaluate import check_data
from recsys.storage.location import Location
from recsys.training.initial_state import start_fresh
from tests.datasets import png, write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.data.items.item_content import rewrite
from tests.recsys.em3_runs import em3_config

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


STEPS, ROWS = 8, 64
WIDTH = 6
IMAGE = ModalitySettings("image", "poster", encoder="random:vit", image_size=32, pooling="cls")


def images(kinds: list[int]) -> list[bytes]:
    """One random image for each kind."""
    return [png(np.random.default_rng(kind)) for kind in kinds]


def three_kinds(n: int) -> list[int]:
    return [index % 3 for index in range(n)]


def one_of_its_own(n: int) -> list[int]:
    return [int(index == n // 2) for index in range(n)]


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, WIDTH))


# Features [n, WIDTH] of each case.
FEATURES: dict[str, Callable[[int], np.ndarray]] = {
    "constant": lambda n: np.full((n, WIDTH), 1234.567),
    "three values": lambda n: np.array(three_kinds(n))[:, None] * 3 + np.full((n, WIDTH), 0.7),
    "duplicated columns": lambda n: np.repeat(normal(n)[:, :2] + 5, WIDTH // 2, axis=1),
    "one outlier": lambda n: normal(n) + 1e6 * np.array(one_of_its_own(n))[:, None],
    "only an outlier": lambda n: 0.1 + 1e6 * np.array(one_of_its_own(n))[:, None] * np.ones(WIDTH),
    "tiny variance": lambda n: 7.7 + 1e-7 * normal(n),
    "tiny numbers": lambda n: 1e-38 * normal(n),
    "huge numbers": lambda n: 1e36 * normal(n),
    "zero vectors": lambda n: np.zeros((n, WIDTH)),
    "rank 1": lambda n: normal(n)[:, :1] * np.arange(1, WIDTH + 1) + 100,
    "one constant column": lambda n: np.where(np.arange(WIDTH) == 0, 1e5, normal(n)),
}
TEXTS: dict[str, Callable[[int], list[str]]] = {
    "constant": lambda n: ["the same title"] * n,
    "three values": lambda n: [f"title {kind}" for kind in three_kinds(n)],
    "one outlier": lambda n: [f"title {kind}" for kind in one_of_its_own(n)],
    "tiny variance": lambda n: [f"{'welcome to our shop ' * 10} {item}" for item in range(n)],
}
KINDS: dict[str, Callable[[int], list[int]]] = {
    "constant": lambda n: [0] * n,
    "three values": three_kinds,
    "one outlier": one_of_its_own,
}


@pytest.mark.parametrize("size", [1, 2, 5, 200])
@pytest.mark.parametrize("case", FEATURES)
def test_projected_outputs_are_bounded_at_the_start(case: str, size: int) -> None:
    torch.manual_seed(0)
    outputs = torch.from_numpy(FEATURES[case](size).astype(np.float32))
    for dim in (2, WIDTH, 16):
        projection = Projection(WIDTH, dim)
        with torch.no_grad():
            start_at_components(projection, outputs)
            projected = projection(outputs)
            unseen = projection(outputs.mean(dim=0) * 1.5)
        # Of n numbers of variance 1, the largest is at most the root of n.
        bound = 1 + size**0.5 if dim == 2 and size > 2 else 1 + 10 * (size * WIDTH) ** 0.5
        assert projected.abs().max() < bound, dim
        if case in ("constant", "zero vectors"):
            assert unseen.abs().max() < bound, dim


def test_full_rank_outputs_start_as_before_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH) + 3
    projection = Projection(WIDTH, 16)
    random_rows = projection.weight.detach()[WIDTH:].clone()

    with torch.no_grad():
        start_at_components(projection, outputs)

    center = outputs.mean(dim=0)
    _, singular, directions = torch.linalg.svd(outputs - center, full_matrices=False)
    expected = directions / (singular / 50**0.5).unsqueeze(1)
    assert torch.equal(projection.weight[:WIDTH], expected)
    assert torch.equal(projection.bias[:WIDTH], -(expected @ center))
    assert torch.equal(projection.weight[WIDTH:], random_rows)


def spoiled(folder: Path, case: str) -> Path:
    """A dataset with the content of a case; ordinary content where the case has none."""
    data = write_dataset(folder / "data", {"train": ROWS, "valid": 24, "test": 20}, 10, 30)

    def spoil(table: pa.Table) -> pa.Table:
        n = table.num_rows
        columns: dict[str, pa.Array] = {}
        if case in FEATURES:
            columns["clip"] = pa.array(FEATURES[case](n).tolist(), pa.list_(pa.float32()))
        if case in TEXTS:
            columns["text"] = pa.array(TEXTS[case](n))
        if case in KINDS:
            columns["poster"] = pa.array(images(KINDS[case](n)), pa.binary())
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, values)
        return table

    rewrite(data, spoil)
    return data


def config_of(folder: Path) -> Config:
    """Text with LoRA, stored features and images of a small EM3 without dropout."""
    config = em3_config(folder)
    content = content_settings(config.content)
    assert content is not None
    modalities = {**content.modalities, "image": IMAGE}
    return replace(config, content=replace(content, modalities=modalities))


def starts(job: Job) -> Iterator[Tensor]:
    """Projected mean tokens of all items, by modality."""
    branch, store = job.em3.content, job.store
    assert branch is not None and store is not None
    content = store.gather(np.sort(store.items.ids))
    for name, encoder in branch.encoders.items():
        encoded: Any = encoder.encode(content[name])  # type: ignore[operator]
        yield mean_token(branch.projections[name](encoded.values), encoded.mask)


def train_some_steps(data: Path) -> tuple[float, float]:
    """Largest number of a projected token at the start, and log loss after some steps."""
    with joined_ranks("cpu") as ranks:
        job = build_job(config_of(data.parent), str(data), ranks)
        start_fresh(job, check_data(job, ("train",)))
        job.em3.eval()
        with torch.no_grad():
            largest = max(float(projected.abs().max()) for projected in starts(job))
        job.em3.train()
        rows = next(ParquetRows.of_split(job.root, "train", job.schema).read(0, ROWS))
        sizes = [ROWS // STEPS] * STEPS + [ROWS]
        build, unknown = job.batch_builder(), UnknownIds(job.schema)
        for step, size in enumerate(sizes):
            loaded = iter([build(rows.slice(step * size % ROWS, size))])
            (batch,) = job.preparation(loaded, unknown, step, training=True)
            job.optimizer.zero_grad()
            loss, (_, logits, _) = job.model(batch)
            if step < STEPS:
                loss.backward()
                job.optimizer.step()
        cross_entropy = nn.functional.binary_cross_entropy_with_logits
        return largest, float(cross_entropy(logits.detach(), batch.labels))


@pytest.mark.parametrize("case", list(dict.fromkeys([*TEXTS, *FEATURES])))
def test_training_on_degenerate_content_stays_near_the_loss_of_the_mean(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(projection_start.logger, "warning", warnings.append)
    largest, log_loss = train_some_steps(spoiled(tmp_path, case))

    assert largest < 1 + 10 * (30 * 32) ** 0.5
    assert log_loss < 1.2 * math.log(2)  # half of the labels are 1
    equal = {"constant": {"text", "clip", "image"}, "zero vectors": {"clip"}}
    equal |= {"one outlier": {"text", "image"}, "only an outlier": {"clip"}}
    equal |= {"tiny variance": {"text"}}
    assert {text.split("'")[1] for text in warnings} == equal.get(case, set())


def test_a_single_item_trains(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": ROWS, "valid": 24, "test": 20}, 10, 4)
    rewrite(data, lambda table: table.filter(pa.array([i == 3 for i in table["item"].to_pylist()])))

    assert train_some_steps(data)[1] < 1.2 * math.log(2)
