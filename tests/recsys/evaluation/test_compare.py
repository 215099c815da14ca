"""`recsys compare` and `recsys train --compare id_only`: runs side by side, on the same rows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.cli import main
from recsys.config import load_config
from recsys.data.item_frequency import SUBSETS
from recsys.evaluation.bootstrap import METRICS, paired_difference
from recsys.evaluation.compare import compare_runs, format_comparison
from recsys.evaluation.metrics import evaluation_report
from recsys.evaluation.scores import SplitScores, read_scores, write_scores
from tests.datasets import write_dataset
from tests.recsys.command_runs import NUM_ROWS, train_argv

ROWS = 300


def scores_with(signal: float) -> SplitScores:
    """Of a model that knows the label so well; no item is unseen."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (ROWS, 1)).astype(np.float32)
    groups, counts = rng.integers(0, 30, ROWS), rng.choice([2, 9], ROWS)
    noise = rng.normal(size=(ROWS, 1)).astype(np.float32)
    rows = np.arange(ROWS)
    return SplitScores(rows, groups, rows, counts, labels, signal * labels + noise, ("liked",))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A weak and a strong run, of which only the scores are there."""
    folders = tmp_path / "weak", tmp_path / "strong"
    for folder, signal in zip(folders, (0.2, 2.0), strict=True):
        folder.mkdir()
        write_scores(scores_with(signal), folder / "scores_test.parquet")
    return folders


def test_a_comparison_holds_the_metrics_of_each_run_and_the_paired_differences(
    runs: tuple[Path, Path],
) -> None:
    weak, strong = (read_scores(run / "scores_test.parquet") for run in runs)
    report = compare_runs(runs, "test")
    assert (report["split"], report["label"], report["users"]) == ("test", "liked", 30)
    assert report["rows"]["all"] == ROWS and report["rows"]["unseen"] == 0
    for run, scores in zip(report["runs"], (weak, strong), strict=True):
        expected = evaluation_report(scores)
        for subset in SUBSETS:
            subset_metrics = expected if subset == "all" else expected[subset]
            assert report["rows"][subset] == subset_metrics["num_samples"]
            for metric in METRICS:
                assert run[subset][metric] == pytest.approx(subset_metrics[metric])
    interval = paired_difference([[weak]], [[strong]], "gauc", "cold")
    actual = report["runs"][1]["cold"]["difference"]["gauc"]
    assert interval is not None and interval.low > 0
    assert actual == {**interval.__dict__, "excludes_zero": True}
    assert report["runs"][1]["unseen"]["difference"] == {"auc": None, "gauc": None}
    assert "difference" not in report["runs"][0]["all"]


def test_rows_without_label_or_weight_and_their_users_are_not_counted(
    runs: tuple[Path, Path],
) -> None:
    for run in runs:
        scores = read_scores(run / "scores_test.parquet")
        labels = np.where(scores.groups[:, None] < 3, np.nan, scores.labels)
        weights = (scores.groups < 10).astype(np.float32)
        write_scores(replace(scores, labels=labels, weights=weights), run / "scores_test.parquet")
    report = compare_runs(runs, "test")
    counted = evaluation_report(read_scores(runs[0] / "scores_test.parquet"))
    assert report["users"] == counted["num_users"] == 7
    assert report["rows"]["all"] == counted["num_samples"] < ROWS
    assert report["rows"]["cold"] == counted["cold"]["num_samples"] > 0


def test_labels_are_compared_by_name_in_any_order(runs: tuple[Path, Path]) -> None:
    for run, turned in zip(runs, (False, True), strict=True):
        scores = read_scores(run / "scores_test.parquet")
        pair = [(scores.labels, scores.logits), (1 - scores.labels, 0 * scores.logits)]
        labels, logits = (np.hstack(entry) for entry in zip(*(pair[::-1] if turned else pair)))
        names = ("left", "liked") if turned else ("liked", "left")
        scores = replace(scores, labels=labels, logits=logits, label_names=names)
        write_scores(scores, run / "scores_test.parquet")
    report = compare_runs(runs, "test")
    assert report["label"] == "liked"
    assert report["runs"][1]["all"]["difference"]["auc"]["value"] > 0.1
    write_scores(scores_with(1.0), runs[1] / "scores_test.parquet")
    with pytest.raises(ValueError, match=r"strong: .*\['left'\]"):
        compare_runs(runs, "test")


def test_the_command_prints_a_line_per_part_and_run_and_writes_the_numbers(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak, strong = runs
    out = tmp_path / "new" / "comparison.json"
    argv = ["compare", "--runs", str(weak), str(strong), str(weak), "--out", str(out)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    report = compare_runs([weak, strong, weak], "test")
    assert json.loads(out.read_text()) == report
    assert [path.name for path in out.parent.iterdir()] == ["comparison.json"]
    table = [line for line in lines if line.endswith(("/weak", "/strong"))]
    assert [line.split()[0] for line in table] == [subset for subset in SUBSETS for _ in range(3)]
    strong_metrics = report["runs"][1]["all"]
    assert table[1].split()[1:3] == [
        f"{strong_metrics['auc']:.4f}",
        f"{strong_metrics['difference']['auc']['value']:+.4f}",
    ]
    assert table[0].count("*") == 0 and table[1].count("*") == 2
    assert table[2].count("[+0.0000, +0.0000]") == 2 and table[2].count("*") == 0
    assert re.match(r"unseen +- +- +- +- +- +- +0 ", table[-2])


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The line that a command which must fail says."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 1
    return capsys.readouterr().err.strip()


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("compare") / "data", NUM_ROWS)


@pytest.mark.long
def test_the_twin_is_trained_after_the_run_goes_on_with_it_and_begins_anew_with_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, baseline = tmp_path / "run", tmp_path / "run" / "id_only"
    argv = train_argv(data, run, "--batch_size", "31")
    assert main(argv) == 0
    time_ns = (run / "checkpoints" / "step-00000002" / "checkpoint.json").stat().st_mtime_ns

    assert main([*argv, "--compare", "id_only"]) == 0  # the run is finished; its twin is not
    assert (run / "checkpoints" / "step-00000002" / "checkpoint.json").stat().st_mtime_ns == time_ns
    config = load_config(baseline / "config.yaml")
    assert config == replace(
        load_config(run / "config.yaml"),
        content="none",
        contrastive=replace(config.contrastive, weight=0.0),
    )
    report = compare_runs([baseline, run], "test")
    assert json.loads((run / "comparison.json").read_text()) == report
    assert format_comparison(report) in capsys.readouterr().out

    assert main([*argv, "--compare", "id_only", "--epochs", "2"]) == 0
    for folder in (run, baseline):
        assert steps_of(folder) == ["step-00000002", "step-00000004"]

    for step in steps_of(baseline):  # without a checkpoint it begins anew
        shutil.rmtree(baseline / "checkpoints" / step)
    assert main([*argv, "--compare", "id_only", "--epochs", "2"]) == 0
    assert steps_of(baseline) == ["step-00000002", "step-00000004"]

    assert main([*argv, "--overwrite", "true"]) == 0
    assert steps_of(run) == ["step-00000002"]
    assert not baseline.exists() and not (run / "comparison.json").exists()


def test_a_twin_that_cannot_be_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*train_argv(data, tmp_path / "run"), "--compare", "id_only"]
    assert "--compare id_only" in fails(capsys, *argv, "--content", "none")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "id_only").mkdir(parents=True)  # say, a run beside others
    assert f"{tmp_path}/run/id_only: " in fails(capsys, *argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["id_only"]
