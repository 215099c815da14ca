"""The attention in the projector is the one by which the Fusion-Q-Former mixes its values."""

from typing import Literal

import pytest
import torch

from recsys.content.fusion import FusionQFormer, JointSelfAttention
from recsys.diagnostics.run_report.projector import attention_weights, recorded_attention

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
def test_attention_is_recorded_while_the_outputs_stay_the_same(
    preset: Literal["published", "modern"], compiled: bool
) -> None:
    torch.manual_seed(0)
    fusion = FusionQFormer(8, 2, num_queries=3, num_layers=2, num_heads=2, preset=preset).eval()
    torch.nn.init.normal_(fusion.output.weight)  # zeros would hide what the layers give
    if compiled:
        fusion.compile(backend="eager", dynamic=True)
    tokens = torch.randn(3, 3, 8)
    before = fusion(tokens, MASK, MODALITY)

    with recorded_attention(fusion, num_modalities=2) as calls:
        during = fusion(tokens, MASK, MODALITY)
    fusion(tokens, MASK, MODALITY)

    torch.testing.assert_close(during, before)
    (shares,) = calls
    assert shares.shape == (3, 2) and (shares[0] > 0).all()


def test_attention_is_shared_out_over_the_tokens_that_items_have() -> None:
    fusion = FusionQFormer(8, 2, num_queries=3, num_heads=2).eval()
    tokens = torch.randn(3, 3, 8)

    with recorded_attention(fusion, 2) as calls:
        fusion(tokens, MASK, MODALITY)
        fusion(tokens[:2], MASK[:2], MODALITY)

    torch.testing.assert_close(calls[1], calls[0][:2])
    assert calls[0][1, 1] == 0 and calls[0][2].tolist() == [0, 0]  # modalities that items lack
    assert (calls[0][0] > 0).all() and calls[0][0].sum() < 1  # the rest is for the queries
