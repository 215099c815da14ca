"""Target attention where all rows have one history: as that of rows with equal histories."""

import logging
from pathlib import Path

import pytest
import torch

from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import shared_target_attention
from recsys.kernels.choice import _are_built, _KernelChoice
from recsys.ranking.layers.target_attention import TargetAttention
from recsys.serving.ranking_graph import SharedHistory

SIZES = [(3, 4, 1, [6, 3]), (5, 70, 0, [64, 16]), (3, 0, 2, [6, 3]), (2, 4, 1, [6]), (2, 3, 1, [])]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("rows", "length", "num_lists", "units"), SIZES)
@pytest.mark.usefixtures("native_kernels")
def test_interest_is_that_of_rows_with_equal_histories(
    rows: int,
    length: int,
    num_lists: int,
    units: list[int],
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module = TargetAttention(8, num_lists, units)
    target, items = torch.randn(rows, 8), torch.randn(length, 8)
    lists = torch.rand(length, num_lists + 1).repeat(rows, 1)  # the last is not of this module
    own_lists = lists[:, :num_lists]
    index, lengths = torch.arange(length).repeat(rows), torch.full((rows,), length)
    expected = module(target, items, JaggedHistory.of(index, lengths, length), own_lists)
    monkeypatch.setattr(_KernelChoice, "kernels", kernels)
    shared = SharedHistory(rows, length, target.device)
    with torch.no_grad():
        torch.testing.assert_close(module(target, items, shared, lists), expected)
    with_gradient = module(target, items, shared, own_lists)
    torch.testing.assert_close(with_gradient, expected)
    assert with_gradient.requires_grad


@pytest.mark.parametrize(("rows", "length", "units"), [(3, 4, [6, 3]), (14, 130, [64, 16])])
@pytest.mark.usefixtures("native_kernels")
def test_in_bfloat16_kernel_and_pytorch_round_the_factors_of_products(
    rows: int, length: int, units: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = TargetAttention(8, 1, units)
    inputs = torch.randn(rows, 8), torch.randn(length, 8), torch.rand(length, 1), torch.rand(8, 1)
    with torch.no_grad():
        exact = shared_target_attention(*inputs, module.score)
        by_kernels = {}
        for kernels in ("native", "torch"):
            monkeypatch.setattr(_KernelChoice, "kernels", kernels)
            by_kernels[kernels] = shared_target_attention(*inputs, module.score, bfloat16=True)
    for rounded in by_kernels.values():
        torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=5e-3)
    assert not by_kernels["torch"].equal(exact)


def test_without_compiled_kernels_pytorch_computes_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(_KernelChoice, "are_loaded", None)
    monkeypatch.setattr(_KernelChoice, "kernels", "auto")
    _are_built.cache_clear()
    caplog.set_level(logging.INFO)
    module, target, items = TargetAttention(8, 0, [6, 3]), torch.randn(2, 8), torch.randn(3, 8)
    shared, lists = SharedHistory(2, 3, target.device), torch.empty(6, 0)
    with torch.no_grad():
        first, second = (module(target, items, shared, lists) for _ in range(2))
    _are_built.cache_clear()
    torch.testing.assert_close(first, module(target, items, shared, lists))
    assert first.equal(second) and not list(tmp_path.iterdir())
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("requests to models with target attention are slower: kernels are not")
