"""The benchmarks of kernels run at their quick sizes; what they measure is equal, or they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels.__main__ import NATIVE, TORCH, kernel_steps
from benchmarks.kernels.libraries import FORMS, libraries
from benchmarks.kernels.operators import QUICK_SIZES, operators
from recsys.kernels import has_native
from recsys.kernels.choice import _Chosen


@pytest.fixture(autouse=True)
def needs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Chosen, "kernels", "auto")  # and as before afterwards
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")


def records_of(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


def test_kernels_are_compared_with_their_references(tmp_path: Path) -> None:
    operators(rounds=1, quick=True, results=tmp_path)
    records = records_of(tmp_path, "kernels")
    assert [record["size"] for record in records] == [size.name for size in QUICK_SIZES]
    assert all(record["torch"] > 0 and record["native"] > 0 for record in records)


def test_operations_of_libraries_give_the_same_numbers(tmp_path: Path) -> None:
    libraries(rounds=1, quick=True, results=tmp_path)
    assert [record["form"] for record in records_of(tmp_path, "kernel_libraries")] == list(FORMS)


@pytest.mark.long
def test_steps_with_and_without_kernels_take_turns(tmp_path: Path) -> None:
    kernel_steps(
        tmp_path, only=["DLRM"], rounds=1, seconds=0.01, quick=True, results=tmp_path / "results"
    )
    (record,) = records_of(tmp_path / "results", "kernel_steps")
    assert list(record["ratios"]) == [TORCH, NATIVE]
    assert all(peak > 0 for peak in record["peak_bytes"].values())
