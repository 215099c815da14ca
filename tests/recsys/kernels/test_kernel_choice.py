"""Kernels are compiled once, and where that is not possible PyTorch computes, with one warning."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recsys.kernels import choose_kernels, has_native
from recsys.kernels.choice import _KernelChoice

OLDER = """
import sys, torch
from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import choice, choose_kernels
from recsys.ranking.layers.target_attention import TargetAttention

def interest(kernels):
    choose_kernels(kernels)
    return attention(target, items, history, torch.zeros(9, 0))

flags = " ".join(choice.FLAGS).replace("native", sys.argv[1]).replace("O3", "O1")
choice.FLAGS = flags.split()
attention, target, items = TargetAttention(8, 0, [16, 4]), torch.randn(2, 8), torch.randn(5, 8)
history = JaggedHistory.of(torch.randint(5, (9,)), torch.tensor([7, 2]), 5)
native = interest("native")
torch.testing.assert_close(native, interest("torch"), rtol=1e-6, atol=1e-6)
with torch.autocast("cpu", torch.bfloat16):
    assert torch.equal(interest("native"), native)
"""
LOAD = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from recsys.kernels import choose_kernels
choose_kernels("native")
from recsys.kernels import native_dot_interaction
print(native_dot_interaction(torch.ones(1, 2), torch.ones(1, 2, 2)).tolist())
"""


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has loaded nothing, on a machine without builds."""
    monkeypatch.setattr(_KernelChoice, "kernels", "auto")
    monkeypatch.setattr(_KernelChoice, "are_loaded", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("command", "cause"), [("/nonexistent/g++", "/nonexistent/g++"), ("false", "false failed")]
)
@pytest.mark.usefixtures("nothing_loaded")
def test_without_a_compiler_pytorch_computes_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, cause: str
) -> None:
    monkeypatch.setenv("CXX", command)
    assert not has_native(torch.zeros(1))
    assert not has_native(torch.zeros(1))  # without a second line
    (warning,) = [record.getMessage() for record in caplog.records]
    assert cause in warning and "\n" not in warning


@pytest.mark.usefixtures("nothing_loaded")
def test_native_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(ValueError, match=r"kernels is native.*/nonexistent/g\+\+.*CXX.*auto"):
        choose_kernels("native")


@pytest.mark.usefixtures("nothing_loaded")
def test_on_cuda_pytorch_computes_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    choose_kernels("native", "cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "kernels is native: on CUDA PyTorch computes, as kernels exist for CPU"
    ]
    with FakeTensorMode():
        assert not has_native(torch.zeros(1, device="cuda"))


def test_other_types_and_the_setting_torch_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not has_native(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    assert not has_native(torch.zeros(1))


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
@pytest.mark.usefixtures("native_kernels")
def test_processors_without_bfloat16_multiply_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: str
) -> None:
    has = {"x86-64-v3": torch.cpu._is_avx2_supported, "x86-64-v4": torch.cpu._is_avx512_supported}
    if processor in has and not has[processor]():
        pytest.skip(f"this processor runs no code of {processor}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    command = [sys.executable, "-c", OLDER, processor]
    process = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "warning:" not in process.stderr


@pytest.mark.long
def test_of_processes_that_start_at_once_one_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    command = [sys.executable, "-c", LOAD]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [out for out, _ in outputs] == ["[[1.0, 1.0, 2.0, 2.0, 2.0]]\n"] * 2
    assert sum("kernels compiled" in log for _, log in outputs) == 1
    assert not any("warning:" in log for _, log in outputs)
