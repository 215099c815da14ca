"""Kernels are compiled once, and where that is not possible PyTorch computes, with one warning."""

import json
import logging
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from statistics import median

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.results import RESULTS
from recsys.content.fusion import FusionQFormer
from recsys.kernels import choose_kernels, has_native, prepare_kernels, refused_kernels
from recsys.kernels.choice import (
    COSTS,
    CompileError,
    _KernelChoice,
    _locked,
    build_state,
    has_built,
    load_kernels,
    log_refusal,
)
from recsys.ranking.layers.target_attention import TargetAttention

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
from recsys.kernels import choice, choose_kernels
choice.FLAGS[choice.FLAGS.index("-O3")] = "-O1"  # compiles sooner
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


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ([64, 16], None),
        ([1024, 512, 256], "attention_units are [1024, 512, 256]; give two, the first at most 512"),
        ([1024, 16], "attention_units are [1024, 16]; give two, the first at most 512"),
    ],
)
def test_an_operator_without_a_kernel_is_named_with_reason_and_cost(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    units: list[int],
    reason: str | None,
) -> None:
    monkeypatch.setattr(_KernelChoice, "are_loaded", True)
    log_refusal.cache_clear()
    caplog.set_level(logging.INFO)
    model = torch.nn.Sequential(TargetAttention(8, 0, units))
    for kernels, device in (("torch", "cpu"), ("auto", "cuda"), ("auto", "cpu"), ("auto", "cpu")):
        prepare_kernels(model, kernels, device)  # type: ignore[arg-type]
    expected = [] if reason is None else [("target_attention", reason)]
    assert refused_kernels(model) == expected
    lines = [record.getMessage() for record in caplog.records if "no kernel" in record.getMessage()]
    assert lines == [
        f"no kernel for {kernel}: {text}; a step takes 1.3 to 3 times as long"
        for kernel, text in expected
    ]


@pytest.mark.usefixtures("native_kernels")
def test_more_tokens_than_the_kernel_takes_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    log_refusal.cache_clear()
    caplog.set_level(logging.INFO)
    fusion, tokens = FusionQFormer(8, 1, num_heads=2), torch.zeros(3, 7, 8)
    for _ in range(2):
        fusion(tokens, torch.ones(3, 7, dtype=torch.bool), torch.zeros(7, dtype=torch.int64))
    assert [record.getMessage() for record in caplog.records] == [
        "no kernel for fusion: an item has 9 tokens with its queries; the kernel takes 8; a step "
        "takes 1.1 to 1.2 times as long"
    ]


def test_the_prices_that_are_named_are_those_of_the_page() -> None:
    lines = (RESULTS / "kernel_gains.jsonl").read_text().splitlines()
    measured: dict[str, list[float]] = {}
    for record in map(json.loads, lines):
        measured.setdefault(record["kernel"], []).append(median(record["x"]))
    assert measured.keys() == COSTS.keys()
    for kernel, ratios in measured.items():
        lowest, highest = re.match(r"([\d.]+) to ([\d.]+) times", COSTS[kernel]).groups()  # type: ignore[union-attr]
        assert float(lowest) <= round(min(ratios), 1) and round(max(ratios), 1) <= float(highest)


def test_who_waits_for_a_compiling_process_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="recsys")
    lock = tmp_path / "lock"
    lock_held, entered = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        with _locked(lock):
            lock_held.set()
            while not caplog.records:  # until the other one has said that it waits
                entered.wait(0.01)

    process = threading.Thread(target=compile_slowly)
    process.start()
    lock_held.wait(10)
    with _locked(lock):
        assert [record.getMessage() for record in caplog.records] == [
            f"waiting for the process that compiles the kernels and holds {lock}"
        ]
    process.join()


@pytest.mark.usefixtures("nothing_loaded")
def test_the_doctors_line_tells_whether_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert build_state().startswith("not compiled yet")
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build_state() == (
        "none, PyTorch computes in their place: C++ compiler '/nonexistent/g++' not found"
    )


@pytest.mark.usefixtures("nothing_loaded")
def test_a_failing_compiler_leaves_no_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    lines = ("#!/bin/sh", '[ "$1" = --version ] && exit 0', 'echo "error: no" >&2', "exit 1")
    compiler.write_text("\n".join(lines))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CompileError, match="failed: error: no"):
        load_kernels()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("nothing_loaded")
def test_on_cuda_pytorch_computes_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    choose_kernels("native", "cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "kernels is native: on CUDA PyTorch computes, as kernels exist for CPU"
    ]
    with FakeTensorMode():
        assert not has_native(torch.zeros(1, device="cuda"))
        assert not has_built(torch.zeros(1, device="cuda"))


def test_other_types_and_the_setting_torch_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not has_native(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    assert not has_native(torch.zeros(1))


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v4"])  # FBGEMM needs AVX2
@pytest.mark.usefixtures("native_kernels")
def test_processors_without_bfloat16_multiply_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: str
) -> None:
    has = {"x86-64-v3": torch.cpu._is_avx2_supported, "x86-64-v4": torch.cpu._is_avx512_supported}
    if not has[processor]():
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
    for _, log in outputs:
        assert "warning:" not in log
        assert ("compiling the kernels" in log) == ("kernels compiled" in log)
