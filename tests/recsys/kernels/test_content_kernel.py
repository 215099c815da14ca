"""The kernel of content interest equals the operations that it replaces, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys.config import HistorySettings
from recsys.content.history_map import HistoryMap
from recsys.content.vectors import ContentVectors, StoredHistory
from recsys.data.jagged_history import JaggedHistory
from recsys.kernels.choice import _Chosen
from recsys.ranking.layers import content_interest
from recsys.ranking.layers.content_interest import ContentInterest

pytestmark = pytest.mark.usefixtures("native_kernels")

# History lengths, D, M, P; and how many distinct items there are.
CASES = {
    "short and empty histories": ([2, 0, 3, 1, 0], 4, 2, 2, 4),
    "long ones, items that occur twice": ([20, 70, 0, 5, 130], 16, 1, 1, 40),
    "no lists": ([50, 3, 4, 9], 10, 3, 0, 30),
    "wide": ([7, 1], 66, 0, 1, 3),
    "only empty histories": ([0, 0], 4, 1, 1, 3),
}


class Case:
    """Content interest over the rows of a bank, with a history map that is trained."""

    def __init__(
        self, lengths: list[int], dim: int, modalities: int, lists: int, num_items: int
    ) -> None:
        torch.manual_seed(0)
        settings = HistorySettings(similarity_features=modalities > 0, lora_rank=2)
        self.interest = ContentInterest(dim, modalities, lists, settings)
        self.map = HistoryMap(dim, settings)
        for parameter in self.map.parameters():
            parameter.data.normal_(std=0.3)  # an adapter starts as zero, and W0 as the identity
        places, self.modalities = sum(lengths), modalities
        index = torch.randint(num_items, (places,))
        self.history = JaggedHistory.of(index, torch.tensor(lengths), num_items)
        # A bank's rows end with the step of their last write.
        self.rows = torch.randn(num_items, (1 + modalities) * dim + 1)[:, :-1]
        self.rows[0] = 0  # an item that the bank does not have
        self.target = torch.randn(len(lengths), dim).requires_grad_()
        self.of_modalities = torch.randn(len(lengths), modalities, dim).requires_grad_()
        self.parallel = torch.rand(places, lists)

    def vectors(self) -> ContentVectors:
        dim = self.target.shape[1]

        def read() -> tuple[Tensor, Tensor]:
            vectors, modalities = self.rows[:, :dim], self.rows[:, dim:]
            return self.map(vectors), modalities.reshape(len(modalities), self.modalities, dim)

        stored = StoredHistory(self.rows, self.map.matrix())
        return ContentVectors(
            self.target, None, self.of_modalities, None, read=read, read_stored=lambda: stored
        )

    def results(self) -> dict[str, Tensor]:
        """Return the output, and the gradients of a weighted sum of it."""
        output = self.interest(self.vectors(), self.history, self.parallel)
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        variables = {"target": self.target, "modalities": self.of_modalities}
        variables |= dict(self.interest.named_parameters())
        variables |= {n: part for n, part in self.map.named_parameters() if part.requires_grad}
        gradients = torch.autograd.grad(
            (output * factor).sum(), list(variables.values()), materialize_grads=True
        )
        return {"output": output.detach(), **dict(zip(variables, gradients, strict=True))}


@pytest.mark.parametrize("name", CASES)
def test_content_interest_equals_the_reference(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = Case(*CASES[name])
    native = case.results()
    monkeypatch.setattr(_Chosen, "kernels", "torch")
    reference = case.results()
    scale = reference["output"].abs().max().item()
    torch.testing.assert_close(
        native.pop("output"), reference.pop("output"), rtol=1e-6, atol=1e-6 * max(scale, 1)
    )
    for name, expected in reference.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            native[name], expected, rtol=1e-5, atol=1e-6 + 1e-5 * largest, msg=name
        )


def test_results_are_equal_to_the_last_bit_for_one_thread_and_two() -> None:
    lengths = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    case, results = Case(lengths, 8, 1, 1, 3000), []  # several groups of rows and of items
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(case.results())
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_the_kernel_is_used_for_rows_of_a_bank_and_without_optional_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, calls = Case([2, 1], 4, 1, 1, 4), []
    kernel = content_interest.native_content_interest
    monkeypatch.setattr(
        content_interest,
        "native_content_interest",
        lambda *inputs: calls.append(1) or kernel(*inputs),
    )
    case.results()
    assert len(calls) == 1
    items, modalities = case.vectors().read_history()  # as in mode `full`
    encoded = ContentVectors(case.target, items, case.of_modalities, modalities)
    case.interest(encoded, case.history, case.parallel)
    case.interest.settings.simtier_bins = 3
    case.interest(case.vectors(), case.history, case.parallel)
    assert len(calls) == 1


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    case = Case([2, 1], 4, 1, 1, 4)
    queries = torch.randn(2, 3, 4, requires_grad=True)
    inputs = (queries, case.rows, torch.eye(4), case.history.index, case.history.offsets)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    interest = torch.ops.recsys.content_interest.default
    torch.library.opcheck(interest, (*inputs, torch.rand(2, 1), case.parallel), test_utils=rules)


def test_an_index_outside_of_the_items_is_an_error() -> None:
    case = Case([2, 1], 4, 1, 1, 4)
    case.history.index[1] = 4
    with pytest.raises(RuntimeError, match=r"recsys::content_interest: .*index\[1\] is 4"):
        case.interest(case.vectors(), case.history, case.parallel)
