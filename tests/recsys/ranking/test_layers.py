"""Layers that backbones share, against plain PyTorch and loops over rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.models.dlrm import InteractionArch

from recsys.config import ranking_settings
from recsys.config.limits import check_settings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import ExtraHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.data.schema_columns import HistoryColumns
from recsys.kernels.choice import _KernelChoice
from recsys.model.build import build_ranking
from recsys.model.losses import RankingLoss
from recsys.ranking.dlrm import DotInteraction
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.fields import (
    HALF_LIVES,
    history_numbers,
    num_history_numbers,
    pooled_history,
    pooling_weights,
)
from recsys.ranking.layers.heads import (
    EnsembleHead,
    EnsembleLinear,
    MemberLinear,
)
from recsys.ranking.layers.row_features import (
    LARGEST,
    MIN_VARIANCE,
    ExtraSequences,
    PiecewiseLinear,
    RowFeatures,
    Standardization,
)
from recsys.ranking.vectors import MemberLogits
from tests.ranks import run_on_ranks
from tests.recsys.ranking.ranking_inputs import (
    CONTENT,
    CONTENT_DIM,
    DIMENSIONS,
    ID_DIM,
    LENGTHS,
    inputs,
)


def outputs_and_gradients(module: nn.Module, num_fields: int) -> list[Tensor]:
    """Output [5, D + I], and the gradients of dense [5, 8] and sparse [5, F, 8]."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 8, generator=generator).requires_grad_()
    sparse = torch.randn(5, num_fields, 8, generator=generator).requires_grad_()
    output = module(dense, sparse)
    output.backward(torch.randn(output.shape, generator=generator))
    assert dense.grad is not None and sparse.grad is not None
    return [output, dense.grad, sparse.grad]


@pytest.mark.parametrize("num_fields", [1, 4, 26])
def test_outputs_and_gradients_are_torchrecs_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, num_fields: int
) -> None:
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    ours = outputs_and_gradients(DotInteraction(num_fields), num_fields)
    torchrecs = outputs_and_gradients(InteractionArch(num_fields), num_fields)
    assert all(torch.equal(*pair) for pair in zip(ours, torchrecs, strict=True))


HISTORY_LENGTHS = torch.tensor([3, 0, 1])
HISTORY = JaggedHistory.of(torch.tensor([0, 1, 0, 2]), HISTORY_LENGTHS, num_items=3)


@pytest.mark.parametrize("num_parallel", [0, 1, 2])
def test_numbers_are_means_by_each_half_life_and_the_length(num_parallel: int) -> None:
    parallel = torch.rand(4, num_parallel, generator=torch.Generator().manual_seed(0))
    rows = []
    for values in parallel.split(HISTORY_LENGTHS.tolist()):
        numbers = []
        for column in range(num_parallel):
            for half_life in (math.inf, *HALF_LIVES):
                weights = [0.5 ** (age / half_life) for age in reversed(range(len(values)))]
                total = sum(w * float(v) for w, v in zip(weights, values[:, column]))
                numbers.append(total / sum(weights) if weights else 0.0)
        rows.append([*numbers, math.log(1 + len(values))])
    numbers = history_numbers(HISTORY, parallel)
    assert numbers.shape == (3, num_history_numbers(num_parallel))
    torch.testing.assert_close(numbers, torch.tensor(rows))


def test_a_history_is_pooled_by_its_mean_its_lists_and_half_lives() -> None:
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])  # histories: 0 1 0, none, 2
    liked = torch.tensor([[1.0], [0.0], [3.0], [5.0]])
    means = pooled_history(items, HISTORY, pooling_weights(HISTORY, liked, [1.0, 1e-3]))
    expected = [
        [[2 / 3, 1 / 3], [0.0, 0.0], [2.0, 2.0]],
        [[4 / 3, 0.0], [0.0, 0.0], [10.0, 10.0]],
        [[5 / 7, 2 / 7], [0.0, 0.0], [2.0, 2.0]],
        [[1.0, 0.0], [0.0, 0.0], [2.0, 2.0]],  # the newest item alone
    ]
    torch.testing.assert_close(torch.stack(means), torch.tensor(expected))


def test_a_very_long_history_has_finite_numbers() -> None:
    history = JaggedHistory.of(torch.zeros(5000, dtype=torch.int64), torch.tensor([5000]), 1)
    liked = torch.zeros(5000, 1)
    liked[-1] = 1
    numbers = history_numbers(history, liked)[0]
    expected = [1 / 5000, *(1 - 0.5 ** (1 / life) for life in HALF_LIVES), math.log(5001)]
    torch.testing.assert_close(numbers, torch.tensor(expected))


BOUGHT = [HistoryColumns("bought", ["bought_price"], [])]
BOUGHT_LENGTHS = torch.tensor([1, 2, 0])
BOUGHT_INDEX = torch.tensor([4, 0, 4])  # of the 5 history items


def extra_sequences_of(encoder: Any) -> ExtraSequences:
    torch.manual_seed(0)
    content = replace(CONTENT, history=replace(CONTENT.history, columns=["bought"]))
    settings = ranking_settings("dlrm", further_histories=encoder)
    return ExtraSequences(settings, ID_DIM, BOUGHT, content)


@pytest.mark.parametrize("encoder", ["attention", "mean"])
def test_content_is_read_as_that_of_a_history_of_these_items_alone(encoder: str) -> None:
    ids, content, batch = inputs()
    prices = torch.rand(3, 1)
    batch.history.extras.append(ExtraHistory(BOUGHT_LENGTHS, prices, 2, BOUGHT_INDEX))
    extra = extra_sequences_of(encoder)
    ids = replace(ids, further=[torch.randn(3, ID_DIM)])

    *pooled, id_vector, content_vector = extra(ids, content, batch).pooled

    assert [len(rows[0]) for rows in (id_vector, content_vector)] == list(extra.widths.values())
    assert len(pooled) == 2 and not id_vector[2].any() and not content_vector[2].any()
    items, modalities = content.read_history()
    encode = extra.content_encoders[0]
    if isinstance(encode, ContentInterest):
        alone = ContentVectors(
            content.target,
            items[BOUGHT_INDEX],
            content.target_modalities,
            modalities[BOUGHT_INDEX],
        )
        history = JaggedHistory.of(torch.arange(3), BOUGHT_LENGTHS, 3)
        torch.testing.assert_close(content_vector, encode(alone, history, prices))
        cosine = F.cosine_similarity(content.target[0], items[4], dim=0)
        torch.testing.assert_close(content_vector[0, CONTENT_DIM], cosine)  # the mean of one item
    else:
        events = items[BOUGHT_INDEX] + prices @ encode.parallel_map.weight.T  # type: ignore[union-attr]
        expected = torch.stack([events[0], events[1:].mean(dim=0)])
        torch.testing.assert_close(content_vector[:2], expected)


NUM_NUMBERS, NUM_ROWS, NUM_STEPS = 3, 8, 4


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale, offset = torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0.8, -2.0, 1000.0])
    return [
        torch.randn(NUM_ROWS, NUM_NUMBERS, generator=generator) * scale + offset + step
        for step in range(NUM_STEPS)
    ]


def after_steps(
    batches_of_rows: list[Tensor],
    weights: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Standardization:
    standardization = Standardization(NUM_NUMBERS, process_group)
    for rows in batches_of_rows:
        standardization(rows, weights)
    return standardization


def assert_statistics(actual: Standardization, rows: Tensor) -> None:
    torch.testing.assert_close(actual.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.variance, rows.var(0, unbiased=False), rtol=1e-3, atol=1e-6)


def test_statistics_are_those_of_all_rows_so_far() -> None:
    assert_statistics(after_steps(batches()), torch.cat(batches()))


def test_evaluation_leaves_the_statistics_and_knows_no_other_rows() -> None:
    standardization = after_steps(batches()).eval()
    old_mean = standardization.mean.clone()
    together = standardization(batches()[0])
    assert torch.equal(standardization.mean, old_mean)
    for row, alone in zip(together, batches()[0]):
        assert torch.equal(standardization(alone.unsqueeze(0))[0], row)


def test_statistics_are_not_rounded_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rounded = after_steps(batches())
    exact = after_steps(batches())
    assert torch.equal(rounded.mean, exact.mean) and torch.equal(rounded.variance, exact.variance)


def test_rows_that_pad_do_not_count() -> None:
    weights = torch.tensor([1.0] * 5 + [0.0] * 3)
    real = [rows[:5] for rows in batches()]
    assert_statistics(after_steps(batches(), weights), torch.cat(real))


@pytest.mark.parametrize("steps", [0, NUM_STEPS])
def test_a_step_of_padding_alone_changes_nothing(steps: int) -> None:
    standardization = after_steps(batches()[:steps])
    old_state = {name: value.clone() for name, value in standardization.state_dict().items()}
    standardization(torch.full((2, NUM_NUMBERS), 9.0), torch.zeros(2))
    for name, value in standardization.state_dict().items():
        assert torch.equal(value, old_state[name]), name


def test_what_hardly_varies_and_what_is_far_off_stays_small() -> None:
    standardization = Standardization(2)
    rows = torch.tensor([[1.0, 0.0]] * 99 + [[1.0 + 1e-4, 1e9]])
    standardized = standardization(rows)
    assert standardized[:, 0].abs().max() < 0.02
    assert standardized.abs().max() <= LARGEST


def statistics_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    rank_rows = [rows[:3] if rank == 0 else rows[3:] for rows in batches()]
    standardization = after_steps(rank_rows, process_group=dist.group.WORLD)
    return {"mean": standardization.mean, "variance": standardization.variance}


def test_ranks_with_unlike_numbers_of_rows_have_the_statistics_of_all_rows() -> None:
    first, second = run_on_ranks(statistics_on_rank, 2)
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["variance"], second["variance"])
    expected = after_steps(batches())
    torch.testing.assert_close(first["mean"], expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["variance"], expected.variance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["din_dcn", "din", "sim", "mmoe"])
@pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])
def test_ranking_models_standardise_numbers_and_leave_vectors(name: str, content: object) -> None:
    settings = ranking_settings(name, mlp_units=[6])
    plain, other = (
        build_ranking(replace(settings, standardize_numbers=on), DIMENSIONS, content).eval()  # type: ignore[arg-type]
        for on in (False, True)
    )
    assert isinstance(plain, RowFeatures) and isinstance(other, RowFeatures)
    assert plain.standardization is None and other.standardization is not None
    other.load_state_dict(plain.state_dict(), strict=False)
    statistics = other.standardization
    statistics.mean += 0.5
    statistics.variance += 3 - MIN_VARIANCE  # a standard deviation of 2
    read = [_features(model, content is not None) for model in (plain, other)]
    is_number = ((read[0] - 0.5) / 2 - read[1]).abs().amax(0) < 1e-6
    assert int(is_number.sum()) == statistics.mean.numel()
    assert torch.equal(read[0][:, ~is_number], read[1][:, ~is_number])


def _features(model: RowFeatures, has_content: bool) -> Tensor:
    ids, content, batch = inputs()
    history, parallel = batch.history.jagged(), batch.history.values
    width = model.feature_dim
    interest = torch.ones(len(LENGTHS), ids.target.shape[1])
    numbers = history_numbers(history, parallel)
    features = model.features(
        ids, content if has_content else None, batch, interest, numbers, history, parallel
    )
    assert features.shape == (len(LENGTHS), width)
    return features


def test_a_linear_map_of_knots_interpolates_and_ends_with_them() -> None:
    basis = PiecewiseLinear(12)  # every half standard deviation from -2 to 3.5
    numbers = torch.tensor([[-9.0, -2.0], [-1.75, 0.1], [3.5, 40.0]])
    heights = torch.arange(12.0) ** 2
    weights = basis(numbers).unflatten(1, (2, 12))
    curve = [[0.0, 0.0], [0.5, 16 + 0.2 * 9], [121.0, 121.0]]
    torch.testing.assert_close(weights @ heights, torch.tensor(curve))
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 2))
    assert int((weights > 0).sum(2).max()) <= 2


def test_knots_are_beside_dense_features_alone() -> None:
    settings = ranking_settings("din_dcn", mlp_units=[6], standardize_numbers=True)
    plain = build_ranking(settings, DIMENSIONS, CONTENT).eval()
    other = build_ranking(replace(settings, number_knots=5), DIMENSIONS, CONTENT).eval()  # type: ignore[call-arg]
    assert isinstance(plain, RowFeatures) and isinstance(other, RowFeatures)
    other.load_state_dict(
        {k: v for k, v in plain.state_dict().items() if not k.startswith(("cross", "mlp"))},
        strict=False,
    )
    without, with_knots = _features(plain, True), _features(other, True)
    num_dense = DIMENSIONS.num_dense
    end = num_dense * 6
    assert torch.equal(with_knots[:, :num_dense], without[:, :num_dense])
    assert torch.equal(with_knots[:, end:], without[:, num_dense:])
    assert torch.equal(with_knots[:, num_dense:end], PiecewiseLinear(5)(without[:, :num_dense]))


@pytest.mark.parametrize("settings", [{"number_knots": 4}, {"number_knots": 1}])
def test_knots_need_standard_deviations_and_a_second_knot(settings: dict[str, int]) -> None:
    is_on = settings["number_knots"] == 1
    ranking = ranking_settings("din", standardize_numbers=is_on, **settings)
    with pytest.raises(ValueError, match=r"ranking.number_knots: \d; set 2 or more"):
        check_settings(ranking, "ranking")


NUM_FEATURES, UNITS, LABELS, MEMBERS, HEAD_ROWS = 5, [7, 4], 2, 3, 6


def head_of(dropout: float = 0.0) -> EnsembleHead:
    torch.manual_seed(0)
    head = EnsembleHead(NUM_FEATURES, UNITS, LABELS, MEMBERS, dropout)
    for parameter in head.parameters():  # off the start, where most scales are 1
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def features() -> Tensor:
    return torch.randn(HEAD_ROWS, NUM_FEATURES, generator=torch.Generator().manual_seed(1))


def member_map(layer: nn.Module, member: int) -> tuple[Tensor, Tensor]:
    """Weight [O, I] and bias [O] of the plain linear map that a member computes."""
    if isinstance(layer, MemberLinear):
        return layer.weight[member].T, layer.bias[member, 0]
    assert isinstance(layer, EnsembleLinear)
    scales = layer.scale_in[member].T * layer.scale_out[member]  # [I, O]
    return (layer.weight * scales).T, layer.bias[member, 0]


def plain_mlp(head: EnsembleHead, member: int, x: Tensor) -> Tensor:
    linear = [layer for layer in head.layers if isinstance(layer, EnsembleLinear | MemberLinear)]
    for layer in linear[:-1]:
        x = torch.relu(F.linear(x, *member_map(layer, member)))
    return F.linear(x, *member_map(linear[-1], member))


def test_each_member_is_a_plain_mlp_whose_weights_are_scaled_by_row_and_column() -> None:
    head, x = head_of(), features()
    members = head(x).members
    assert members.shape == (MEMBERS, HEAD_ROWS, LABELS)
    for member in range(MEMBERS):
        torch.testing.assert_close(members[member], plain_mlp(head, member, x))


def test_gradients_of_the_members_losses_are_those_of_plain_mlps() -> None:
    head, reference, labels = head_of(), head_of(), torch.rand(HEAD_ROWS, LABELS).round()
    loss = RankingLoss([1.0, 0.5])
    loss(head(features()).members, labels).backward()
    losses = [loss(plain_mlp(reference, member, features()), labels) for member in range(MEMBERS)]
    torch.stack(losses).mean().backward()
    for (name, parameter), expected in zip(head.named_parameters(), reference.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_in_evaluation_the_mean_logit_ranks() -> None:
    head, x = head_of(dropout=0.5), features()
    logits = head.eval()(x)
    logits_by_member = [plain_mlp(head, member, x) for member in range(MEMBERS)]
    torch.testing.assert_close(logits, torch.stack(logits_by_member).mean(0))
    torch.testing.assert_close(MemberLogits(torch.stack(logits_by_member)).logits, logits)


@pytest.mark.parametrize("units", [[], [7], [7, 4, 3]])
def test_evaluation_folds_the_scales_into_the_weights(units: list[int]) -> None:
    head = EnsembleHead(NUM_FEATURES, units, LABELS, MEMBERS, dropout=0.0)
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    expected = head(features()).members.mean(0)
    for evaluated in (head.eval(), head.packaged(bfloat16=False)):
        torch.testing.assert_close(evaluated(features()), expected, rtol=1e-6, atol=1e-6)
    rounded = head.packaged(bfloat16=True)(features())
    torch.testing.assert_close(rounded, expected, rtol=2e-2, atol=2e-2)
    is_exact = torch.allclose(rounded, expected, rtol=1e-6, atol=1e-6)
    assert is_exact == (not units)  # the last layer computes in float32


@pytest.mark.parametrize("name", ["din_dcn", "din", "sim"])
@pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])
def test_ranking_models_have_ensembles(name: str, content: object) -> None:
    torch.manual_seed(0)
    settings = ranking_settings(name, mlp_units=UNITS, ensemble_members=MEMBERS, dropout=0.0)
    model = build_ranking(settings, DIMENSIONS, content)  # type: ignore[arg-type]
    ids, vectors, batch = inputs()
    scored = model(ids, vectors, batch)
    assert isinstance(scored, MemberLogits) and scored.members.shape == (MEMBERS, 3, 1)
    scored.members.sum().backward()
    torch.testing.assert_close(model.eval()(ids, vectors, batch), scored.logits)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.mlp.parameters())  # type: ignore[union-attr]
