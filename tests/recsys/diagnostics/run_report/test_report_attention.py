"""The attention that the report shows is the one by which the Fusion-Q-Former mixes its values."""

from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from recsys.config import ContentSettings, ModalitySettings
from recsys.config import FusionSettings as Fusion
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import StoredFeatures
from recsys.content.fusion import ConcatFusion, FusionQFormer, JointSelfAttention
from recsys.data.batch import ContentInput
from recsys.diagnostics.run_report.fusion_attention import (
    MeanAttention,
    attention_weights,
    fusion_attention,
    recorded_attention,
)

# Items of 3, 2 and 0 tokens, of modalities 0, 0 and 1.
MASK = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
MODALITY = torch.tensor([0, 0, 1])


@pytest.mark.parametrize("num_tokens", [5, 12])  # the plain products, and the fused kernel
def test_weights_times_values_are_what_the_module_gives(num_tokens: int) -> None:
    torch.manual_seed(0)
    attention = JointSelfAttention(dim=8, num_heads=2)
    x = torch.randn(3, num_tokens, 8)
    mask = torch.rand(3, num_tokens) < 0.7
    mask[:, 0] = True

    weights = attention_weights(attention, x, mask, num_outputs=2)
    values = attention.value(x).unflatten(-1, (2, 4))
    mixed = attention.output(torch.einsum("uqht,uthd->uqhd", weights, values).flatten(-2))

    torch.testing.assert_close(mixed, attention(x, mask, 2))
    assert not weights.masked_select(~mask[:, None, None, :]).any()


@pytest.mark.parametrize("preset", ["published", "modern"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_layer_is_recorded_while_the_outputs_stay_the_same(
    preset: Literal["published", "modern"], compiled: bool
) -> None:
    torch.manual_seed(0)
    fusion = FusionQFormer(8, 2, num_queries=3, num_layers=2, num_heads=2, preset=preset).eval()
    torch.nn.init.normal_(fusion.output.weight)  # zeros would hide what the layers give
    if compiled:
        fusion.compile(backend="eager", dynamic=True)
    tokens = torch.randn(3, 3, 8)
    before = fusion(tokens, MASK, MODALITY)

    with recorded_attention(fusion, num_modalities=2) as layers:
        during = fusion(tokens, MASK, MODALITY)
    fusion(tokens, MASK, MODALITY)

    torch.testing.assert_close(during, before)
    assert [layer.counts.tolist() for layer in layers] == [[3, 2, 1]] * 2
    assert not torch.equal(layers[0].mean, layers[1].mean)
    # Item 2 has only queries to look at, and the shares of each item add up to 1.
    torch.testing.assert_close(
        layers[0].sums.sum(dim=1), torch.full((4,), 3.0, dtype=torch.float64)
    )


def test_attention_is_the_same_in_however_many_calls_items_come() -> None:
    fusion = FusionQFormer(8, 2, num_heads=2).eval()
    tokens = torch.randn(3, 3, 8)

    with recorded_attention(fusion, 2) as (at_once,):
        fusion(tokens, MASK, MODALITY)
    with recorded_attention(fusion, 2) as (in_parts,):
        for first, stop in pairwise((0, 2, 3)):
            fusion(tokens[first:stop], MASK[first:stop], MODALITY)

    torch.testing.assert_close(in_parts.mean, at_once.mean)


def test_a_modality_counts_the_items_that_have_it_and_tokens_are_added_up() -> None:
    found = MeanAttention.zeros(num_queries=1, num_modalities=2)
    weights = torch.tensor([[[0.5, 0.125, 0.125, 0.25]], [[0.75, 0.125, 0.125, 0.0]]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])

    found.add(weights, mask, column=torch.tensor([0, 1, 1, 2]))

    expected = [[0.625, 0.25, 0.25], [(1 / 4 + 1 / 3) / 2, (2 / 4 + 2 / 3) / 2, 1 / 4]]
    torch.testing.assert_close(found.mean, torch.tensor(expected, dtype=torch.float64))


def branch(fusion: str) -> ContentBranch:
    settings = ContentSettings(
        {"clip": ModalitySettings("feature", "clip")}, dim=8, fusion=Fusion(fusion, num_heads=2)
    )
    settings.history.mode = "full"
    return ContentBranch({"clip": StoredFeatures(4)}, settings, None).eval()


def clips(mask: Tensor) -> dict[str, ContentInput]:
    return {"clip": ContentInput(torch.randn(len(mask), 1, 4), mask)}


def test_a_modality_that_no_item_has_is_a_dash() -> None:
    of_clips = branch("qformer")

    with recorded_attention(of_clips.fusion, 1) as layers:
        of_clips.encode(clips(torch.tensor([[False], [False]])))
    (drawing,) = fusion_attention(of_clips, layers).drawings

    assert drawing.name == "attention-layer-1"
    assert "linear map" in fusion_attention(of_clips, layers).words[1]
    assert b">\xe2\x80\x93<" in drawing.svg and b">nan<" not in drawing.svg


def test_models_without_queries_have_words_alone() -> None:
    of_clips = branch("concat")
    assert isinstance(of_clips.fusion, ConcatFusion)

    with recorded_attention(of_clips.fusion, 1) as layers:
        of_clips.encode(clips(torch.tensor([[True], [False]])))
    section = fusion_attention(of_clips, layers)

    assert section.drawings == [] and "ConcatFusion " in section.words[0]
    assert "content branch" in fusion_attention(None, []).words[0]
