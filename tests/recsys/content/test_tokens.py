"""All tokens of a modality in the fusion: queries read the tokens, the linear map their mean."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings import MemoryBank
from recsys.config import ContentSettings, FusionSettings, ModalitySettings
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import Encoder, StoredFeatures, build_encoder
from recsys.content.encoders.efficientnet import EfficientNetFeatures, EfficientNetPatches
from recsys.content.encoders.image_encoders import ModuleEncoder
from recsys.content.fusion import FusionQFormer
from recsys.data.batch import ContentInput
from tests.recsys.content.tiny_branch import DIM, FEATURE_DIM, MAX_TOKENS, NUM_ITEMS, content_of

NUM_HEADS = 2
ALL = torch.arange(NUM_ITEMS)  # 3 lacks text, 5 features, 0 both


def branch_of(training: Any = "frozen") -> ContentBranch:
    text = ModalitySettings(
        "text", "text", "random:bert", training=training, pooling="none", max_length=MAX_TOKENS
    )
    settings = ContentSettings(
        {"text": text, "clip": ModalitySettings("feature", "clip")},
        dim=DIM,
        fusion=FusionSettings(num_heads=NUM_HEADS, dropout=0.0),
    )
    torch.manual_seed(0)
    encoders: dict[str, Encoder] = {
        "text": build_encoder("text", text),
        "clip": StoredFeatures(FEATURE_DIM),
    }
    branch = ContentBranch(encoders, settings, MemoryBank(NUM_ITEMS, settings.vector_dim, "cpu"))
    for name, weight in branch.named_parameters():
        if not name.startswith("encoders."):  # the start hides queries and missing modalities
            nn.init.normal_(weight, std=0.3)
    return branch.train()


def attended(layer: Any, x: Tensor, num_queries: int) -> Tensor:  # [Q + T, D] -> [Q, D]
    """Return the queries' part of a pre-norm layer, head by head."""
    attention, normed = layer.attention, layer.attention_norm(x)
    heads = []
    for columns in torch.arange(DIM).chunk(NUM_HEADS):
        query, key, value = (
            F.linear(normed, layer.weight[columns], layer.bias[columns])
            for layer in (attention.query, attention.key, attention.value)
        )
        scores = query[:num_queries] @ key.T / (DIM / NUM_HEADS + 1e-5) ** 0.5
        heads.append(scores.softmax(dim=1) @ value)
    x = x[:num_queries] + attention.output(torch.cat(heads, dim=1))
    return x + layer.feed_forward(layer.feed_forward_norm(x))


def by_hand(branch: ContentBranch, item: int) -> Tensor:  # [D]
    """Fuse one item from its own tokens alone, without padding or mask."""
    content, fusion, tokens = content_of(torch.tensor([item])), branch.fusion, []
    assert isinstance(fusion, FusionQFormer) and fusion.linear is not None
    for name, data in content.items():
        values, encoder = data.values[data.mask].unsqueeze(0), branch.encoders[name]
        if name == "text" and data.mask.any():
            assert isinstance(encoder, nn.Module)
            values = encoder.model(input_ids=values).last_hidden_state
            values = values.half() if encoder.training_mode == "frozen" else values
        width = branch.projections[name].in_features
        tokens.append(branch.projections[name](values.reshape(-1, width).float()))
    means = [
        tokens_of_one.mean(dim=0) if len(tokens_of_one) else fusion.linear.missing[index]
        for index, tokens_of_one in enumerate(tokens)
    ]
    assert fusion.modality_embedding is not None
    embedded = [
        modality_tokens + name
        for modality_tokens, name in zip(tokens, fusion.modality_embedding.weight, strict=True)
    ]
    (layer,) = fusion.layers
    queries = attended(layer, torch.cat([fusion.queries, *embedded]), len(fusion.queries))
    linear = fusion.linear.output(torch.cat(means))
    fused: Tensor = fusion.output(fusion.norm(queries).flatten()) + linear
    return fused


@pytest.mark.parametrize("training", ["frozen", "full"])
def test_items_equal_those_fused_alone_in_plain_pytorch_outputs_and_gradients(
    training: str,
) -> None:
    branch, plain = branch_of(training), branch_of(training)
    vectors = branch.encode(content_of(ALL))[:, :DIM]
    expected = torch.stack([by_hand(plain, item) for item in ALL.tolist()])
    torch.testing.assert_close(vectors, expected, atol=2e-3, rtol=1e-3)  # tokens are float16

    factor = torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(1))
    for result in (vectors, expected):
        (factor * result).sum().backward()
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, parameter in branch.named_parameters():
        if name.startswith(("fusion.", "projections.text")) or "encoder.layer" in name:
            gradient = gradients[name]
            assert (parameter.grad is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, atol=5e-3, rtol=5e-3, msg=name)


class FakeNetwork(nn.Module):
    """Features of 5 channels at each of 2 x 3 places."""

    def extract_features(self, pixels: Tensor) -> Tensor:  # [U, 3, H, W] -> [U, 5, 2, 3]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(pixels), 5, 2, 3, generator=generator)


def test_the_places_of_an_image_are_tokens_whose_mean_is_its_pooled_vector() -> None:
    pixels = torch.zeros(4, 3, 64, 96)
    pooled, patches = (make(FakeNetwork()) for make in (EfficientNetFeatures, EfficientNetPatches))
    assert patches(pixels).shape == (4, 6, 5)
    torch.testing.assert_close(patches(pixels).mean(dim=1), pooled(pixels))
    assert ModuleEncoder(patches, False, 64).frozen_tokens == 6


def test_a_token_too_large_for_half_precision_is_refused() -> None:
    large = EfficientNetPatches(FakeNetwork())
    large.network.extract_features = lambda pixels: torch.full((len(pixels), 5, 2, 3), 7e4)  # type: ignore[assignment]
    encoder = ModuleEncoder(large, False, 64)
    images = ContentInput(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.ones(2, 1).bool())
    with pytest.raises(ValueError, match=r"'ModuleEncoder'.*7e\+04.*65504"):
        encoder.frozen_outputs(images)
