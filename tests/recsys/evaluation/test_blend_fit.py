"""The blend is fitted to held-out rows, and its scores are of blends that do not know the user."""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from recsys.evaluation.blend_fit import PRIOR_ROWS, cross_fitted_logits, fitted_blend
from recsys.ranking.neighbours import NUM_BLENDED


def scored_rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows whose label depends on both models' logits, at half their size, and on the evidence."""
    torch.manual_seed(seed)
    network, evidence = torch.randn(count, 1) * 2, torch.randn(count, NUM_BLENDED)
    evidence_logits = torch.randn(count, 1)
    labels = ((network + evidence_logits) / 2 + evidence[:, :1] - 0.3).sigmoid().bernoulli()
    groups = torch.randint(0, 40, (count,))
    rows = {"network": network, "evidence_logits": evidence_logits, "evidence": evidence}
    return {**rows, "labels": labels, "groups": groups}


def test_weights_are_those_of_a_logistic_regression() -> None:
    rows = scored_rows(20_000)
    blend = fitted_blend(rows, ("bce",))
    columns = [rows[name] for name in ("network", "evidence_logits", "evidence")]
    inputs = torch.cat(columns, dim=1)
    reference = LogisticRegression(C=1e6).fit(inputs, rows["labels"][:, 0])
    expected = torch.tensor(reference.coef_, dtype=torch.float32)
    torch.testing.assert_close(blend.weight, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(
        blend.bias, torch.tensor(reference.intercept_).float(), rtol=0, atol=0.01
    )


def test_few_rows_change_little() -> None:
    assert float((fitted_blend(scored_rows(2), ("bce",)).weight[0, 0] - 1).abs()) < 2 / PRIOR_ROWS
    empty = fitted_blend({name: rows[:0] for name, rows in scored_rows(2).items()}, ("bce",))
    assert empty.weight.tolist() == [[1.0] + [0.0] * (1 + NUM_BLENDED)]


def test_rows_without_weight_or_label_count_nothing() -> None:
    rows = scored_rows(400)
    weights = torch.ones(400)
    weights[200:300] = 0
    labels = rows["labels"].clone()
    labels[300:] = torch.nan
    fitted = fitted_blend({**rows, "labels": labels, "weights": weights}, ("bce",))
    first_rows = {name: column[:200] for name, column in rows.items()}
    expected = fitted_blend(first_rows, ("bce",))
    torch.testing.assert_close(fitted.weight, expected.weight, rtol=0, atol=1e-5)


def test_a_user_is_scored_by_a_blend_fitted_without_him() -> None:
    rows = scored_rows(400)
    changed = {**rows, "labels": rows["labels"].clone()}
    is_own = rows["groups"] == rows["groups"][0]
    changed["labels"][is_own] = 1 - changed["labels"][is_own]
    first, second = (cross_fitted_logits(columns, ("bce",)) for columns in (rows, changed))
    assert torch.equal(first[is_own], second[is_own])
    assert not torch.equal(first[~is_own], second[~is_own])


def test_a_number_is_blended_by_least_squares() -> None:
    rows = scored_rows(2000)
    rows["labels"] = 3 * rows["network"] + rows["evidence"][:, 1:2] + 5
    blend = fitted_blend(rows, ("mse",))
    torch.testing.assert_close(blend.weight[0, [0, 3]], torch.tensor([3.0, 1.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(blend.bias, torch.tensor([5.0]), rtol=0, atol=0.05)
