"""Dropout: how much is dropped, what is left, and that gradients pass where values do."""

import torch

from recsys.content.dropout import Dropout
from recsys.model.id_vectors import IDDropout


def test_a_share_p_is_dropped_and_the_rest_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    output = Dropout(0.3)(torch.ones(1000, 100))
    dropped = (output == 0).float().mean()
    assert abs(float(dropped) - 0.3) < 0.01
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([1 / 0.7]))


def test_gradients_pass_where_values_do() -> None:
    inputs = torch.ones(50, 50, requires_grad=True)
    output = Dropout(0.5)(inputs)
    output.sum().backward()
    assert torch.equal(inputs.grad, output.detach())


def test_nothing_is_dropped_in_evaluation_or_with_probability_zero() -> None:
    inputs = torch.randn(10, 10)
    assert torch.equal(Dropout(0.5).eval()(inputs), inputs)
    assert torch.equal(Dropout(0.0)(inputs), inputs)


def test_it_draws_anew_in_each_call_and_keeps_the_type() -> None:
    dropout, inputs = Dropout(0.5), torch.ones(100, dtype=torch.bfloat16)
    assert not torch.equal(dropout(inputs), dropout(inputs))
    assert dropout(inputs).dtype == torch.bfloat16


def test_id_dropout_leaves_out_whole_vectors_and_scales_nothing() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(10_000, 3, requires_grad=True)
    output = IDDropout(0.3)(vectors)
    is_dropped = (output == 0).all(dim=1)
    assert abs(float(is_dropped.float().mean()) - 0.3) < 0.02
    assert torch.equal(output[~is_dropped], vectors[~is_dropped])
    output.sum().backward()
    assert torch.equal(vectors.grad, (~is_dropped).float().unsqueeze(1).expand(-1, 3))


def test_id_dropout_keeps_all_in_evaluation() -> None:
    vectors = torch.randn(10, 3)
    assert IDDropout(0.5).eval()(vectors) is vectors
