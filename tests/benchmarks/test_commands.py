"""Benchmarks run at sizes of seconds, by turns, and their pages say what they measured."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.__main__ import SUITES, main
from benchmarks.compare import PLAIN, compare
from benchmarks.compare import variants as variants_to_compare
from benchmarks.continual.runs import rows_trained, view_before
from benchmarks.events.__main__ import OURS, QUICK, SQL, benchmark
from benchmarks.generative import generative
from benchmarks.kernels.gains import CALLERS, gains
from benchmarks.kernels.operators import QUICK_SIZES, operators
from benchmarks.ladder import ladder, reading, rows_of
from benchmarks.loader import benchmark as loader
from benchmarks.results import ROOT, without_local_paths
from benchmarks.retrieval import retrieval
from benchmarks.scaling import curves_of, scaling
from benchmarks.sequences import variants_of
from benchmarks.settings import Device, setting
from benchmarks.throughput import throughput
from benchmarks.timing.ranks import RankReport
from benchmarks.timing.rounds import QUICK_EFFORT, Measurement, measure, ratio
from benchmarks.timing.step_work import PARTS
from benchmarks.timing.steps import Variant
from recsys.kernels import has_native
from recsys.storage.location import Location
from tests.benchmarks.variants import quick_variant
from tests.recsys.training.continual.walk_runs import NAMES, ROWS, write_walk


def lines_of(results: Path, name: str) -> list[dict[str, Any]]:
    """The records of a benchmark whose page, with its plot if it has one, is there, too."""
    page = (results / f"{name}.md").read_text()
    if (results / f"{name}.png").exists():
        assert f"({name}.png)" in page
    records = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
    for record in records:
        assert {"benchmark", "machine", "versions", "commit", "date", "command"} <= record.keys()
    return records


def test_a_package_that_a_benchmark_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = {"name": "matplotlib"}

    def run_module(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named '{lacks['name']}'", name=lacks["name"])

    monkeypatch.setattr(runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", sys.argv)

    assert main(["quality", "parts"]) == 1

    message = capsys.readouterr().err
    assert "benchmark parts needs the package matplotlib" in message and "install-dev" in message
    lacks["name"] = "benchmarks.renamed"  # a mistake of ours, which no installation mends
    with pytest.raises(ModuleNotFoundError, match="renamed"):
        main(["quality", "parts"])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), "cuda"])
def test_benchmarks_of_speed_run_on_the_device_that_is_asked_for(
    tmp_path: Path, device: Device
) -> None:
    sized = setting("A", quick=True)
    rows = rows_of("A", str(sized.recipe), *sized.prepared(tmp_path, device))
    curves = curves_of(tmp_path, True, [1], [50], device)
    variants = [
        *variants_to_compare(tmp_path, True, [], device),
        *(row.variant for row in rows),
        *(variant for curve in curves for _, variant in curve.points()),
        *variants_of(tmp_path, 16, True, ["hstu"], True, device).values(),
    ]
    assert {variant.config().device for variant in variants} == {device}


def test_compare_measures_every_variant_against_both_twins(tmp_path: Path) -> None:
    names = [PLAIN, "ID only", "bank_lora"]
    compare(tmp_path / "out", names, quick=True, in_process=True, results=tmp_path)
    records = {record["name"]: record for record in lines_of(tmp_path, "compare")}
    assert list(records) == names
    for record in records.values():
        rates = record["samples_per_second"]
        assert 0 < rates["P10"] <= rates["P50"] <= rates["P90"]
        for values in record["ratios"].values():
            assert values["lowest"] <= values["median"] <= values["highest"]
    assert records[PLAIN]["ratios"][PLAIN]["median"] == 1.0
    assert records["ID only"]["configuration"]["content"] == "none"
    assert records["bank_lora"]["configuration"]["content"]["history"]["mode"] == "bank_lora"


@pytest.mark.parametrize("setting", ["A", "B"])
def test_throughput_splits_a_step_into_parts(setting: Any, tmp_path: Path) -> None:
    throughput(tmp_path / "out", setting, quick=True, in_process=True, results=tmp_path)
    (record,) = lines_of(tmp_path, f"throughput_{setting.lower()}")
    assert sum(record["parts_seconds"].values()) == pytest.approx(record["step_seconds"])
    assert set(record["parts_seconds"]) <= set(PARTS)
    assert min(record["parts_seconds"].values()) >= 0
    for part in ("lookup", "encoders", "fusion", "ranking", "backward", "optimizer"):
        assert record["parts_seconds"][part] > 0
    assert record["flops"] > 1e6 and record["arithmetic_seconds"] > 0
    assert record["peak_bytes"] >= record["resting_bytes"] > 0


@pytest.mark.long
def test_ladder_multiplies_speed_ups_and_reads_profiles(tmp_path: Path) -> None:
    only = ["items encoded once"]
    rungs = ladder(tmp_path / "out", "A", only, quick=True, in_process=True, results=tmp_path)
    records = lines_of(tmp_path, "ladder_a")
    assert [record["row"] for record in records] == ["plain PyTorch", "items encoded once"]
    assert records[1]["base"] == "plain PyTorch"
    assert records[1]["over_first"] == pytest.approx(records[1]["speed_up"]["median"])
    assert records[0]["items_encoded"] is None and records[1]["items_encoded"] > 0
    page = (tmp_path / "ladder_a.md").read_text()
    assert page.count(reading(rungs[1])) == 1


def test_suites_name_modules_that_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored afterwards
    modules = [module for suite in SUITES.values() for module in suite.values()]
    assert all(find_spec(module) is not None for module in modules)
    assert main(["speed", "unknown"]) == 2
    assert "speed: compare" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["speed", "compare", "--help"])
    assert "--in_process" in capsys.readouterr().out


def test_steps_without_a_kernel_are_compared_with_all_kernels(tmp_path: Path) -> None:
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    gains(tmp_path / "data", rounds=1, steps=1, quick=True, results=tmp_path)
    records = lines_of(tmp_path, "kernel_gains")
    assert {record["kernel"] for record in records} == set(CALLERS)
    assert all(ratio > 0 for record in records for ratio in record["x"])


def test_kernels_are_compared_with_their_references(tmp_path: Path) -> None:
    if not has_native(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    operators(rounds=1, quick=True, results=tmp_path)
    records = lines_of(tmp_path, "kernels")
    assert [record["size"] for record in records] == [size.name for size in QUICK_SIZES]
    assert all(record["torch"] > 0 and record["native"] > 0 for record in records)


def test_the_loader_is_measured_with_and_without_content_and_threads(tmp_path: Path) -> None:
    sizes = {"rows": 64, "items": 20, "batch_size": 16}
    out = tmp_path / "results"
    loader(tmp_path, [3], workers=[1], passes=1, step_ms=1.0, results=out, **sizes)
    cases = [
        (record["case"]["content"], record["case"]["num_workers"])
        for record in lines_of(out, "loader")
    ]
    assert cases == [(False, 0), (False, 1), (True, 0), (True, 1)]


def test_indexes_are_compared_with_exact_search(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    retrieval(items=(1, 3000), dim=16, queries=20, results=tmp_path)
    lines = lines_of(tmp_path, "retrieval")
    assert [record["recall"]["10"] for record in lines[:3]] == [1.0] * 3  # one item: all find it
    records = {record["index"]: record for record in lines[3:]}
    assert records["flat"]["recall"] == {"10": 1.0, "100": 1.0}
    assert records["hnsw"]["recall"]["10"] > 0.95 and records["ivf"]["recall"]["10"] > 0.5


@pytest.mark.long
def test_requests_to_a_generative_model_are_timed_by_the_width_of_the_beam(tmp_path: Path) -> None:
    generative(items=60, requests=20, beams=(10, 50), rows=256, results=tmp_path)
    narrow, wide = lines_of(tmp_path, "generative")
    assert (narrow["beam"], wide["beam"]) == (10, 50)
    assert narrow["passes"] is None and wide["passes"] == (wide["p50"] < 20)


@pytest.mark.parametrize("setting", ["A", "B"])
def test_each_row_of_a_ladder_makes_one_change_to_the_row_it_names(setting: str) -> None:
    rows = {row.name: row for row in rows_of(setting, "recipe", "data", ())}
    for row in rows.values():
        if row.base is None:
            continue
        base = rows[row.base].variant
        argv = row.variant.overrides[len(base.overrides) :]
        assert row.variant.overrides[: len(base.overrides)] == base.overrides
        settings = {key.rsplit(".", 1)[0] for key in argv[::2]}  # halves of one thing count once
        fields = ("kind", "ranks", "loaded_batches")
        changed = [name for name in fields if getattr(row.variant, name) != getattr(base, name)]
        assert len(settings) + len(changed) == 1, row.name


@pytest.mark.long
def test_scaling_compares_each_point_with_the_first(tmp_path: Path) -> None:
    curves = ["history", "unique items, full"]
    scaling(tmp_path / "out", curves, quick=True, in_process=True, results=tmp_path)
    records = lines_of(tmp_path, "scaling")
    assert [record["curve"] for record in records] == [name for name in curves for _ in range(2)]
    first, second, few, all_ids = records
    assert first["slower_than_first"]["median"] == 1.0
    # As many impressions with three times the history, and more distinct items to encode.
    assert second["counts"]["history"] == 3 * first["counts"]["history"]
    assert few["x"] < all_ids["x"] and few["counts"]["encoded"] < all_ids["counts"]["encoded"]


@pytest.mark.parametrize("command", [compare, throughput, ladder, scaling])
def test_quick_figures_never_replace_real_ones(command: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--quick.*--results"):
        command(tmp_path, quick=True)


def measurement(seconds: list[list[float]], rows: int = 100) -> Measurement:
    """Of one rank."""
    report = RankReport(rows, 2, 1, [])
    return Measurement(Variant("v", "", ""), 1, seconds, [1.0], [report])


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine is three times slower in the second round, for both.
    this = measurement([[0.1, 0.1, 0.5], [0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
    other = measurement([[0.2, 0.2, 0.2], [0.6, 0.6, 0.6], [0.4, 0.4, 0.4]])
    actual = ratio(this, other)
    assert (actual.median, actual.lowest, actual.highest) == pytest.approx((2.0, 2.0, 4.0))
    twice = ratio(measurement(this.seconds, rows=200), other)
    assert twice.median == pytest.approx(4.0)


def test_a_rank_that_fails_ends_the_benchmark_with_its_cause(tmp_path: Path) -> None:
    missing = quick_variant(tmp_path).changed("missing", data=str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"variant 'missing', rank 0(.|\n)*nowhere"):
        measure([missing], QUICK_EFFORT)


def test_folders_of_the_command_and_of_the_clone_are_named_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", "/disk/bench/", "--results", "mine"])
    text = f"{ROOT}/benchmarks/settings/a.yaml /disk/bench/data --out /disk/bench mine"
    assert without_local_paths(text) == "benchmarks/settings/a.yaml OUT/data --out OUT mine"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out=/disk/bench", "--data", "/"])
    assert without_local_paths("a/b /disk/bench/data") == "a/b OUT/data"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--runs", "[/disk/one,/disk/two/]"])
    assert without_local_paths("--runs [/disk/one,/disk/two/]") == "--runs [RUNS,RUNS/]"
    by_title = '{"One": "/disk/one", "Two": "/disk/two"}'
    monkeypatch.setattr(sys, "argv", ["unseen_shares.py", "--data", by_title])
    assert without_local_paths(f"--data {by_title}") == '--data {"One": "DATA", "Two": "DATA"}'


def test_all_programs_write_the_same_dataset_and_are_measured(tmp_path: Path) -> None:
    results = tmp_path / "results"
    benchmark(tmp_path / "out", users=300, items=50, quick=True, results=results)

    records = [json.loads(line) for line in (results / "events.jsonl").read_text().splitlines()]
    by_job = {(record["job"], record["events"]): record for record in records}
    assert {(OURS, QUICK), (SQL, QUICK)} <= by_job.keys()
    assert by_job[OURS, QUICK]["list_values"] == by_job[SQL, QUICK]["list_values"]
    for record in records:
        assert record["seconds"] > 0 and record["peak"] > 1e6 and record["processor"] > 0
    assert "events/s" in (results / "events.md").read_text()
    assert not any((tmp_path / "out").rglob("*.parquet"))


def test_a_view_has_the_partitions_before_and_is_tested_on_the_next(tmp_path: Path) -> None:
    write_walk(tmp_path / "data")
    view = Location.of(view_before(tmp_path, NAMES, 2))
    counts = {
        split: sum(
            pq.read_metadata(file.path).num_rows for file in (view / split).files(".parquet")
        )
        for split in ("train", "valid", "test")
    }
    assert counts == {"train": ROWS[0] + ROWS[1], "valid": ROWS[2], "test": ROWS[2]}
    assert rows_trained(tmp_path, NAMES, 2, []) == counts["train"]
    first_rows = rows_trained(tmp_path, NAMES, 1, [])
    assert rows_trained(tmp_path, NAMES, 2, [4]) == counts["train"] + 3 * first_rows
