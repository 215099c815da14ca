"""The report on a GPU, tried out without one: its plan, its pieces, its page and its figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import __main__ as report
from benchmarks.gpu_report.speed import busy_microseconds, speed
from benchmarks.gpu_report.stages import Stage, stages


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_plan_says_what_would_run_and_how_long(
    no_gpu: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert report.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    plan = stages(tmp_path)
    assert all(stage.name in printed for stage in plan)
    assert (
        f"{len(plan)} stages, about {sum(stage.minutes for stage in plan):.0f} minutes" in printed
    )
    assert not list(tmp_path.iterdir())


def test_wheels_for_cuda_without_a_gpu_end_with_the_cause(
    no_gpu: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert report.main(["--out", str(tmp_path)]) == 1
    assert "finds no GPU: Found no NVIDIA driver" in capsys.readouterr().err
    assert report.main(["--out", str(tmp_path), "--dry-run"]) == 0


FIGURE = {
    "model": "dlrm",
    "precision": "bf16",
    "rows": 512,
    "source": "memory",
    "peak_gb": 1.0,
    "samples_per_second": 1000.0,
    "kernels": 200.0,
    "busy_share": 0.5,
    "waits": 0.0,
}


def test_pieces_go_on_where_the_last_one_ended_and_the_page_has_what_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(name: str, code: str) -> Stage:
        return Stage(name, (sys.executable, "-c", code), minutes=1.0)

    flag = tmp_path / "mended"
    plan = [
        stage("doctor", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"),
        stage("waits hstu", f"import os; assert os.path.exists({str(flag)!r}), 'a wait'"),
        stage("speed dlrm bf16", f"print('Figures:', {json.dumps(json.dumps(FIGURE))})"),
    ]
    monkeypatch.setattr(report, "stages", lambda *options: plan)
    results = tmp_path / "results"
    argv = ["--out", str(tmp_path), "--device", "cpu", "--results", str(results), "--minutes"]
    assert report.main([*argv, "0.5"]) == report.STAGES_REMAIN
    assert "2 stages have not run yet." in (results / "gpu.md").read_text()
    assert report.main([*argv, "10"]) == 1  # one has failed
    page = (results / "gpu.md").read_text()
    assert "| dlrm | bf16 | 512 | memory | 1,000 | 200 | 50% | 0.0 | 1.0 |" in page
    assert "waits hstu: failed with 1: AssertionError: a wait" in page
    flag.touch()
    assert report.main([*argv, "10"]) == 1
    assert report.main([*argv, "10", "--retry"]) == 0
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize(
    "model", ["dlrm", "bare", pytest.param("hstu_200", marks=pytest.mark.long)]
)
def test_a_stage_prints_the_figures_of_each_batch_and_source(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed(model, tmp_path, "fp32", "cpu", quick=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Figures: ")]
    metrics = [json.loads(line.removeprefix("Figures: ")) for line in lines]
    assert [(f["rows"], f["source"]) for f in metrics] == [
        *((8, "memory"), (8, "parquet")),
        *((16, "memory"), (16, "parquet")),
    ]
    assert all(values["samples_per_second"] > 0 for values in metrics)


def test_kernels_that_run_at_once_count_once() -> None:
    assert busy_microseconds([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
