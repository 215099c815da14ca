"""The cost formulas, against PyTorch's own count of a real step and against numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing.steps import ProductSteps
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.frozen_groups import ITEMS_PER_GROUP
from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.model_sizes import ContentSizes, ModelSizes
from recsys.diagnostics.cost.roofline import Anchor, best, measure_anchor, typical
from recsys.diagnostics.cost.step_costs import (
    content_parts,
    roofline_by_measured_part,
    step_costs,
)
from recsys.diagnostics.cost.work import PartCost, Work
from recsys.kernels import has_native
from tests.benchmarks.variants import product_steps, quick_variant
from tests.recsys.em3_runs import all_texts_run

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm)


def flops_of_addmm(
    added: list[int], left: list[int], right: list[int], **_: object
) -> int:  # of shapes
    return 2 * left[0] * left[1] * right[1]


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which by itself knows of no products in place."""
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: flops_of_addmm})


def counted_products(steps: ProductSteps) -> tuple[float, float, BatchCounts]:
    """FLOPs of matrix products, forward and backward, that PyTorch counts in one step."""
    batch = next(steps.batches)
    with flop_counter() as forward:
        loss, _ = steps.job.model(batch)
    with flop_counter() as backward:
        loss.backward()
    return products(forward), products(backward), BatchCounts.of(batch)


def sizes_of(steps: ProductSteps) -> ModelSizes:
    assert steps.sizes is not None
    return steps.sizes


def part_of(name: str, content: ContentSizes, counts: BatchCounts) -> PartCost:
    (found,) = [part for part in content_parts(content, counts) if part.name == name]
    return found


def products(counter: FlopCounterMode) -> float:
    counts = counter.get_flop_counts()["Global"]
    return float(sum(counts.get(product, 0) for product in PRODUCTS))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--content", "none"),
        ("--content.history.mode", "bank_dense"),
        ("--content.history.mode", "bank_frozen"),
        ("--content.history.mode", "full"),
        ("--content.fusion.preset", "published", "--embedding.index_dedup", "false"),
        ("--content.fusion.name", "concat", "--contrastive.weight", "0"),
    ],
    ids=lambda words: " ".join(words) or "bank_lora",
)
def test_products_of_matrices_are_those_that_pytorch_counts(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    # The formulas count PyTorch's operations; to its counter kernels are no products.
    with product_steps(quick_variant(tmp_path, *overrides, "--kernels", "torch")) as steps:
        forward, backward, counts = counted_products(steps)
        parts = step_costs(sizes_of(steps), counts)
    assert sum(part.forward.products for part in parts) == pytest.approx(forward, rel=0.02)
    assert sum(part.backward.products for part in parts) == pytest.approx(backward, rel=0.02)


@pytest.mark.parametrize("similarity", [True, False])
def test_kernels_map_queries_and_sums_in_place_of_items(similarity: bool, tmp_path: Path) -> None:
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    words = ("--content.history.similarity_features", str(similarity).lower())
    with product_steps(quick_variant(tmp_path, *words)) as steps:
        content, counts = sizes_of(steps).content, BatchCounts.of(next(steps.batches))
    assert content is not None
    found, product = part_of("history map", content, counts), 2 * content.dim**2
    if similarity:  # the targets too, and the items' lengths once
        of_rows, of_items = 3 * counts.rows, counts.unique_history
    else:
        of_rows, of_items = 2 * counts.rows, 0
    assert found.forward.products == product * (of_rows + of_items)
    assert found.backward.products == product * (2 * of_rows + of_items)


def test_trained_layers_of_an_encoder_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    with product_steps(quick_variant(tmp_path, "--kernels", "torch", name="B")) as steps:
        forward, backward, counts = counted_products(steps)
        parts = step_costs(sizes_of(steps), counts)
    assert sum(part.forward.products for part in parts) == pytest.approx(forward, rel=0.02)
    assert sum(part.backward.products for part in parts) == pytest.approx(backward, rel=0.02)


def test_layers_below_are_counted_where_they_are_not_cached(tmp_path: Path) -> None:
    words = ("--content.modalities.title.cache_frozen_layers", "false")
    with product_steps(quick_variant(tmp_path, *words, name="B")) as steps:
        batch = next(steps.batches)
        store, branch = steps.job.store, steps.job.em3.content
        assert store is not None and branch is not None
        encoder = branch.encoders["title"]
        assert isinstance(encoder, Encoder)
        ids = np.arange(ITEMS_PER_GROUP)  # a whole group, so that nothing is padded
        content = store.gather(ids)
        of_items = replace(batch, content_items=torch.tensor(ids), content=content)
        with all_texts_run(), flop_counter() as counter:
            counts = BatchCounts.of(of_items)
            encoder.encode(content["title"])
        sizes = sizes_of(steps).content
    assert sizes is not None
    found = part_of("encoders", sizes, counts)
    assert found.forward.products == pytest.approx(products(counter), rel=0.02)


def test_sampled_items_alone_have_a_backward(tmp_path: Path) -> None:
    with product_steps(quick_variant(tmp_path)) as steps:
        sizes = sizes_of(steps)
        counts = BatchCounts.of(next(steps.batches))
    half = replace(counts, with_gradient=counts.encoded / 2)
    assert sizes.content is not None
    whole, sampled = (part_of("fusion", sizes.content, of) for of in (counts, half))
    assert sampled.forward == whole.forward
    assert sampled.backward.flops == pytest.approx(whole.backward.flops / 2)


def test_communication_costs_nothing_on_one_rank_and_grows_with_ranks(tmp_path: Path) -> None:
    settings = ("--content.history.bank", "sharded", "--embedding.sharding", "row_wise")
    with product_steps(quick_variant(tmp_path, *settings)) as steps:
        sizes = sizes_of(steps)
        counts = BatchCounts.of(next(steps.batches))
    sent = {
        ranks: sum(
            part.forward.bytes + part.backward.bytes
            for part in step_costs(sizes, counts, ranks)
            if part.name == "communication"
        )
        for ranks in (1, 2, 4)
    }
    assert sent[1] == 0
    # By hand, of row-wise tables: ids go to one rank of two and lengths to the other; of the two
    # pooled features each rank has a part of every row of the other's batch.
    ids = 8 * (sum(counts.ids.values()) + counts.looked_up) / 2 + 4 * 4 * counts.rows
    vectors = 2 * 4 * 16 * (2 * counts.rows + counts.looked_up / 2)
    kept = (8 + 4 * 17) * (counts.encoded + counts.unique_history) / 2
    assert sent[2] == pytest.approx(ids + vectors + kept + 4 * sizes.dense_parameters)
    assert sent[4] > 1.5 * sent[2]


def test_a_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    anchor = Anchor(flops_per_second=100.0, bytes_per_second=10.0)
    assert Work(products=150, others=50, bytes=10).roofline(anchor) == 2.0
    assert Work(products=100, bytes=30).roofline(anchor) == 3.0
    parts = [
        PartCost("map", "content", Work(products=100), Work(products=200)),
        PartCost("bank", "content", Work(bytes=5), Work()),
        PartCost("optimizer", "optimizer", Work(bytes=20)),
    ]
    assert roofline_by_measured_part(parts, anchor) == {
        "content": 1.5,
        "backward": 2.0,
        "optimizer": 2.0,
    }


def test_anchors_are_positive_and_summed_up_by_median_and_best() -> None:
    anchor = measure_anchor(gemm_size=32, copy_bytes=4096)
    assert anchor.flops_per_second > 0 and anchor.bytes_per_second > 0
    anchors = [Anchor(1.0, 30.0), Anchor(3.0, 10.0), Anchor(2.0, 20.0)]
    assert typical(anchors) == Anchor(2.0, 20.0)
    assert best(anchors) == Anchor(3.0, 30.0)


def test_parts_of_the_ranking_model_have_their_own_forward_and_backward(tmp_path: Path) -> None:
    with product_steps(quick_variant(tmp_path)) as steps:
        parts = {part.name: part for part in sizes_of(steps).ranking}
        ranking = steps.job.em3.ranking
    assert list(parts) == [
        f"ranking, {name}" for name in ("content interest", "interest", "cross", "mlp")
    ]
    widths = [layer.weight.shape for layer in ranking.mlp.modules() if hasattr(layer, "weight")]
    of_row = sum(2 * rows * columns for rows, columns in widths)
    assert parts["ranking, mlp"].forward.products == pytest.approx(of_row)
    assert parts["ranking, mlp"].backward.products == pytest.approx(2 * of_row, rel=0.02)
