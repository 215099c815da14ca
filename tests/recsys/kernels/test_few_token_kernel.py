"""The kernel that attends among an item's few tokens equals plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.content.fusion import JointSelfAttention
from recsys.kernels.choice import _Chosen

pytestmark = pytest.mark.usefixtures("native_kernels")

# An item with all tokens, and others that lack some; a query is never masked.
MASK = torch.tensor([[True] * 4, [True, True, False, True], [True, False, False, False]])


def results(attention: JointSelfAttention, tokens: Tensor, num_outputs: int) -> list[Tensor]:
    variables = [tokens, *attention.parameters()]
    output = attention(tokens, MASK, num_outputs)
    return [output, *torch.autograd.grad(output.square().sum(), variables)]


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("num_outputs", [2, 4])
def test_attention_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, num_outputs: int, num_heads: int
) -> None:
    torch.manual_seed(0)
    attention = JointSelfAttention(18, num_heads)
    tokens = torch.randn(3, 4, 18, requires_grad=True)
    native = results(attention, tokens, num_outputs)
    assert all(map(torch.equal, native, results(attention, tokens, num_outputs)))
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    reference = results(attention, tokens, num_outputs)
    torch.testing.assert_close(native[0], reference[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(native[1:], reference[1:], rtol=1e-5, atol=1e-5)


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    query, tokens = torch.randn(3, 2, 6, requires_grad=True), torch.randn(3, 4, 6)
    attend = torch.ops.recsys.few_token_attention.default
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attend, (query, tokens, tokens, MASK, 3, 0.5), test_utils=rules)
