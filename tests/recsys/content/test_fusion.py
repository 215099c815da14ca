"""Fusions against a loop-written reference and hand-computed values, with gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from recsys.content import fusion as fusion_module
from recsys.content.fusion import ConcatFusion, FusionQFormer
from tests.fake_gpu import fake_gpu, on_fake_gpu

NUM_ITEMS, NUM_TOKENS, DIM, NUM_HEADS, NUM_QUERIES = 3, 2, 8, 4, 2
MODALITY = torch.arange(NUM_TOKENS)


def qformer(preset: str, num_layers: int = 1) -> FusionQFormer:
    torch.manual_seed(0)
    fusion = FusionQFormer(
        DIM,
        NUM_TOKENS,
        NUM_QUERIES,
        num_layers,
        NUM_HEADS,
        0.0,
        preset,  # type: ignore[arg-type]
    )
    # `modern` starts at zero here, which would hide what the queries do.
    nn.init.normal_(fusion.output.weight, std=0.2)
    return fusion


def some_tokens() -> Tensor:
    return torch.randn(NUM_ITEMS, NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def all_there() -> Tensor:
    return torch.ones(NUM_ITEMS, NUM_TOKENS, dtype=torch.bool)


def affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def published_layer(weights: dict[str, Tensor], rows: list[Tensor]) -> list[Tensor]:
    """Joint self-attention, residual and post-norm, one head and one row at a time."""
    size = DIM // NUM_HEADS
    query, key, value = (
        [affine(weights, f"attention.{name}", row) for row in rows]
        for name in ("query", "key", "value")
    )
    outputs = []
    for i, row in enumerate(rows):
        heads = []
        for head in range(NUM_HEADS):
            head_slice = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[i][head_slice] @ k[head_slice] for k in key])
            attention = torch.exp(scores / math.sqrt(size + 1e-5))
            attention = attention / attention.sum()
            heads.append(sum(a * v[head_slice] for a, v in zip(attention, value)))
        x = row + affine(weights, "attention.output", torch.cat(heads))  # type: ignore[arg-type]
        centred = x - x.mean()
        normed = centred / torch.sqrt((centred**2).mean() + 1e-5)
        outputs.append(normed * weights["norm.weight"] + weights["norm.bias"])
    return outputs


def published_reference(weights: dict[str, Tensor], tokens: Tensor, num_layers: int) -> Tensor:
    """The published Fusion-Q-Former, item by item."""
    vectors = []
    for item in tokens:
        rows = [*weights["queries"], *item]
        for layer in range(num_layers):
            prefix = f"layers.{layer}."
            layer_weights = {
                k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)
            }
            rows = published_layer(layer_weights, rows)
        vectors.append(affine(weights, "output", torch.cat(rows[:NUM_QUERIES])))
    return torch.stack(vectors)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_published_equals_the_formula_in_outputs_and_gradients(num_layers: int) -> None:
    fusion = qformer("published", num_layers)
    for parameter in fusion.parameters():  # biases and norms start where errors would not show
        nn.init.normal_(parameter, std=0.5)
    weights = {k: v.detach().clone().requires_grad_() for k, v in fusion.named_parameters()}
    tokens = some_tokens().requires_grad_()
    reference_tokens = some_tokens().requires_grad_()
    factor = torch.randn(NUM_ITEMS, DIM)

    output = fusion(tokens, all_there(), MODALITY)
    expected = published_reference(weights, reference_tokens, num_layers)
    (output * factor).sum().backward()
    (expected * factor).sum().backward()

    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.grad, reference_tokens.grad, atol=1e-5, rtol=1e-4)
    for name, parameter in fusion.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-5, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("preset", ["published", "modern"])
def test_what_lies_under_the_mask_does_not_matter(preset: str) -> None:
    fusion = qformer(preset, num_layers=2).eval()
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    tokens = some_tokens()
    garbage = torch.where(mask.unsqueeze(-1), tokens, 1e4)
    result, other = fusion(tokens, mask, MODALITY), fusion(garbage, mask, MODALITY)
    assert torch.equal(result, other)
    assert torch.isfinite(result).all()


def test_modern_starts_as_the_linear_map_and_its_queries_learn_from_there() -> None:
    torch.manual_seed(0)
    fusion = FusionQFormer(DIM, NUM_TOKENS, NUM_QUERIES, num_heads=NUM_HEADS, dropout=0.0)
    tokens, mask = some_tokens(), torch.tensor([[True, True], [True, False], [False, False]])
    assert fusion.linear is not None
    linear = fusion.linear(tokens, mask, MODALITY)
    torch.testing.assert_close(fusion(tokens, mask, MODALITY), linear)
    torch.testing.assert_close(fusion.eval()(tokens, mask, MODALITY), linear)
    fusion.train()

    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    queries = fusion.queries.detach().clone()
    for moved in (False, True):  # in the first step the gradient ends at the zeros
        optimizer.zero_grad()
        fusion(tokens, mask, MODALITY).square().sum().backward()
        optimizer.step()
        assert torch.equal(fusion.queries, queries) != moved


def test_concat_is_the_mean_token_of_each_modality_through_one_linear_map() -> None:
    fusion = ConcatFusion(dim=2, num_modalities=2)
    with torch.no_grad():
        fusion.output.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]]))
        fusion.output.bias.copy_(torch.tensor([0.5, 0.0]))
        fusion.missing.copy_(torch.tensor([[9.0, 9.0], [7.0, 8.0]]))
    # Modality 0 has two tokens, modality 1 one.
    tokens = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
    ).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    output = fusion(tokens, mask, torch.tensor([0, 0, 1]))
    # Item 0: means (2, 3) and (5, 6); item 1: (1, 2) and the vector of the missing modality 1.
    expected = torch.tensor(
        [[2.0 + 6 + 15 + 24 + 0.5, 3.0 - 6], [1.0 + 4 + 21 + 32 + 0.5, 2.0 - 8]]
    )
    torch.testing.assert_close(output, expected)
    output[:, 0].sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0].tolist() == [[0.5, 1.0], [0.5, 1.0], [3.0, 4.0]]
    assert tokens.grad[1].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert fusion.missing.grad is not None
    assert fusion.missing.grad.tolist() == [[0.0, 0.0], [3.0, 4.0]]


def test_heads_that_do_not_divide_the_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_heads .*dim 8"):
        FusionQFormer(dim=8, num_modalities=1, num_heads=3)


@pytest.mark.parametrize("preset", ["published", "modern"])
def test_few_tokens_are_attended_to_as_many_are(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for few_tokens in (fusion_module.FEW_TOKENS, 0):
        monkeypatch.setattr(fusion_module, "FEW_TOKENS", few_tokens)
        fusion = qformer(preset, num_layers=2).train()
        tokens = some_tokens().requires_grad_()
        mask = torch.tensor([[True, False], [True, True], [False, False]])
        output = fusion(tokens, mask, MODALITY)
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        inputs = [tokens, *fusion.parameters()]
        results.append((output, torch.autograd.grad((factor * output).sum(), inputs)))
    (short, short_gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(short, padded, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(short_gradients, padded_gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("preset", ["published", "modern"])
def test_items_on_a_gpu_are_fused_on_that_gpu(preset: str) -> None:
    inputs = [some_tokens(), all_there(), MODALITY]
    fusion = qformer(preset).eval()
    with fake_gpu():
        fused = on_fake_gpu(fusion)(*on_fake_gpu(inputs))
        assert fused.shape == (NUM_ITEMS, DIM) and fused.device.type == "cuda"
