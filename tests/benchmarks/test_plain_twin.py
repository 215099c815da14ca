"""The plain PyTorch twin computes what the product computes in history mode `full`.

The twin shares no code with the model, encodes every item of every padded history and scores
padded pairs, so that equal logits and gradients also say that the product's unique items, jagged
histories and split attention are right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.dataset import DatasetSize, write_dataset
from benchmarks.plain_twin import PlainBaseline, PlainSource, padded
from benchmarks.settings import QUICK_SIZE
from benchmarks.timing.steps import ProductSteps
from recsys.data.batch import Batch
from tests.benchmarks.variants import NO_DROPOUT, product_steps, quick_variant
from tests.fake_gpu import fake_gpu, on_fake_gpu

FULL = ("--content.history.mode", "full")
# Names that differ: the twin's -> the product's.
RENAMED = {
    "encoder.queries": "content.fusion.queries",
    "encoder.norm.": "content.fusion.norm.",
    "encoder.output.": "content.fusion.output.",
    "encoder.linear.": "content.fusion.linear.output.",
    "encoder.modality": "content.fusion.modality_embedding.weight",
    "encoder.projections.0.": "content.projections.text.",
    "encoder.projections.1.": "content.projections.image.",
    "history_map.weight": "content.history_map.map.weight",
    "interest.": "ranking.interest.",
    "content_interest.": "ranking.content_interest.attention.",
    "mlp.": "ranking.mlp.",
    "content_map.": "losses.contrastive.content_map.",
    "id_map.": "losses.contrastive.id_map.",
}
LAYER = {
    "self_attn.out_proj.": "attention.output.",
    "linear1.": "feed_forward.0.",
    "linear2.": "feed_forward.2.",
    "norm1.": "attention_norm.",
    "norm2.": "feed_forward_norm.",
}


def of_product(name: str, values: Mapping[str, Tensor]) -> Tensor:
    """The twin's parameter `name` among the product's weights or gradients."""
    if name.startswith("encoder.layers."):
        number, suffix = name.removeprefix("encoder.layers.").split(".", 1)
        layer = f"content.fusion.layers.{number}."
        if suffix.startswith("self_attn.in_proj_"):
            kind = suffix.removeprefix("self_attn.in_proj_")
            names = ("query", "key", "value")
            return torch.cat([values[f"{layer}attention.{key}.{kind}"] for key in names])
        theirs, ours = next((t, o) for t, o in LAYER.items() if suffix.startswith(t))
        return values[layer + suffix.replace(theirs, ours)]
    if name.startswith("cross."):
        _, direction, number, kind = name.split(".")
        kernels = {"down.weight": "V_kernels", "up.weight": "W_kernels", "up.bias": "bias"}
        return values[f"ranking.cross.{kernels[f'{direction}.{kind}']}.{number}"]
    theirs = next(t for t in RENAMED if name.startswith(t))
    return values[name.replace(theirs, RENAMED[theirs])]


def tables_of(steps: ProductSteps) -> dict[str, Tensor]:
    """Weights by table, whole, as a single rank has them."""
    state = steps.job.model.state_dict().items()
    return {
        name.split(".")[-2]: value.local_shards()[0].tensor
        for name, value in state
        if hasattr(value, "local_shards")
    }


@torch.no_grad()
def copy_weights(model: PlainBaseline, steps: ProductSteps) -> None:
    dense, tables = dict(steps.job.em3.named_parameters()), tables_of(steps)
    pooled: list[Any] = [bag.weight for bag in model.bags]
    for weight, name in zip([*pooled, model.items.weight], ["user", "tags", "item"], strict=True):
        weight.copy_(tables[name])
    for name, parameter in dense_parameters(model).items():
        parameter.copy_(of_product(name, dense))


def dense_parameters(baseline: PlainBaseline) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in baseline.named_parameters()
        if not name.startswith(("bags.", "items."))
    }


def first_batch(steps: ProductSteps) -> Batch:
    return next(steps.batches)


@pytest.mark.parametrize("size", [QUICK_SIZE, DatasetSize(**{**vars(QUICK_SIZE), "jagged": True})])
def test_twin_and_product_agree_on_loss_logits_and_gradients(
    size: DatasetSize, tmp_path: Path
) -> None:
    variant = quick_variant(tmp_path, *FULL, *NO_DROPOUT)
    data = str(write_dataset(tmp_path / "sized", size))
    with product_steps(variant.changed("full", data=data)) as steps:
        baseline = PlainSource(steps.job.config, data, steps.ranks).build_model()
        # It starts at zero, which would hide what the queries do.
        nn.init.normal_(steps.job.em3.get_parameter("content.fusion.output.weight"), std=0.1)
        copy_weights(baseline, steps)
        batch = first_batch(steps)
        logits, loss, rows = baseline_step(baseline, batch)
        old_weights = tables_of(steps)["item"].clone()
        product_loss, (_, product_logits, _) = steps.job.model(batch)
        torch.testing.assert_close(logits, product_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, product_loss, rtol=1e-5, atol=1e-6)
        product_loss.backward()
        gradients: dict[str, Any] = {n: p.grad for n, p in steps.job.em3.named_parameters()}
        for name, parameter in dense_parameters(baseline).items():
            expected = of_product(name, gradients)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)
        # The tables' gradients are applied in the backward, by row-wise Adagrad.
        updated = rowwise_adagrad(old_weights, rows, steps.job.config.embedding.learning_rate)
        torch.testing.assert_close(tables_of(steps)["item"], updated, rtol=1e-3, atol=1e-5)


def baseline_step(baseline: PlainBaseline, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss, and the gradient of the item table."""
    loss, logits = baseline(padded(batch))
    loss.backward()
    gradient = baseline.items.weight.grad
    assert gradient is not None
    return logits, loss, gradient.to_dense()


def rowwise_adagrad(weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The first step from zero moments."""
    moment = gradient.pow(2).mean(dim=1, keepdim=True)
    return weight - rate * gradient / (moment.sqrt() + 1e-8)


def test_the_twin_and_its_batches_move_to_a_gpu(tmp_path: Path) -> None:
    variant = quick_variant(tmp_path, *FULL)
    with product_steps(variant) as steps:
        baseline = PlainSource(steps.job.config, variant.data, steps.ranks).build_model()
        batch = padded(first_batch(steps))
    moved = [*vars(batch.to(torch.device("meta"))).values(), *baseline.to("meta").buffers()]
    pooled = [tensor for pair in moved.pop(0) for tensor in pair]
    assert {tensor.device.type for tensor in (*moved, *pooled)} == {"meta"}
    baseline.encoder.layers = nn.ModuleList()  # PyTorch's attention looks for the device inside
    with fake_gpu():
        loss, logits = on_fake_gpu(baseline)(on_fake_gpu(batch))
    assert (loss.device.type, logits.device.type) == ("cuda", "cuda")
