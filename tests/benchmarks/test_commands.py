"""Every benchmark command at its quick sizes: it runs and leaves its three files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import start_times
from benchmarks.compare import PLAIN, compare
from benchmarks.ladder import Rung, ladder, reading
from benchmarks.ladder_rows import rows_of
from benchmarks.scaling import scaling
from benchmarks.throughput import throughput
from benchmarks.timing.step_work import PARTS


def lines_of(results: Path, name: str) -> list[dict[str, Any]]:
    """The records of a benchmark whose page and plot are there, too."""
    page = (results / f"{name}.md").read_text()
    assert f"({name}.png)" in page
    with Image.open(results / f"{name}.png") as plot:
        assert plot.size == (1280, 720)
    records = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
    for record in records:
        wanted = {"benchmark", "configuration", "machine", "versions", "commit", "date", "command"}
        assert wanted <= record.keys()
    return records


def test_compare_measures_every_variant_against_both_twins(tmp_path: Path) -> None:
    names = [PLAIN, "ID only", "bank_lora"]
    compare(tmp_path / "out", names, quick=True, here=True, results=tmp_path)
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


def test_start_times_are_those_of_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_times, "BARS", {"--help": 1e9})
    assert start_times.start_times(rounds=1, results=tmp_path)
    (record,) = map(json.loads, (tmp_path / "start_times.jsonl").read_text().splitlines())
    assert record["seconds"] > 0
    assert "`recsys --help`" in (tmp_path / "start_times.md").read_text()


@pytest.mark.parametrize("setting", ["A", "B"])
def test_throughput_splits_a_step_into_parts(setting: Any, tmp_path: Path) -> None:
    throughput(tmp_path / "out", setting, quick=True, here=True, results=tmp_path)
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
    rungs = ladder(tmp_path / "out", "A", only, quick=True, here=True, results=tmp_path)
    records = lines_of(tmp_path, "ladder_a")
    assert [record["row"] for record in records] == ["plain PyTorch", "items encoded once"]
    assert records[1]["base"] == "plain PyTorch"
    assert records[1]["over_first"] == pytest.approx(records[1]["speed_up"]["median"])
    assert records[0]["items_encoded"] is None and records[1]["items_encoded"] > 0
    page = (tmp_path / "ladder_a.md").read_text()
    assert page.count(reading(rungs[1])) == 1


def test_reading_names_the_part_that_changed_most(tmp_path: Path) -> None:
    class Profiled:
        def __init__(self, **milliseconds: float) -> None:
            self.part_seconds = {name: value / 1e3 for name, value in milliseconds.items()}

    row = rows_of("A", "recipe", "data", ())[0]
    before: Any = Profiled(fusion=60.0, ranking=10.0, backward=30.0)
    after: Any = Profiled(fusion=8.0, ranking=12.0, backward=20.0)
    rung = Rung(row, after, before, None, 2.5)  # type: ignore[arg-type]
    assert reading(rung) == (
        "fusion falls most, from 60.0 to 8.0 ms of a step that went from 100.0 to 40.0 ms; most of "
        "it is now backward (50%) and ranking (30%)."
    )
    plain: Any = Profiled(forward=50.0, backward=40.0, optimizer=10.0)
    joined = reading(Rung(row, after, plain, None, 2.5))  # type: ignore[arg-type]
    assert joined.startswith("forward ")


@pytest.mark.parametrize("setting", ["A", "B"])
def test_each_row_of_a_ladder_makes_one_change_to_the_row_it_names(setting: str) -> None:
    rows = {row.name: row for row in rows_of(setting, "recipe", "data", ())}
    for row in rows.values():
        if row.base is None:
            continue
        base = rows[row.base].variant
        words = row.variant.overrides[len(base.overrides) :]
        assert row.variant.overrides[: len(base.overrides)] == base.overrides
        settings = {word.rsplit(".", 1)[0] for word in words[::2]}  # halves of one thing count once
        fields = ("kind", "ranks", "loaded_batches")
        changed = [name for name in fields if getattr(row.variant, name) != getattr(base, name)]
        assert len(settings) + len(changed) == 1, row.name


@pytest.mark.long
def test_scaling_compares_each_point_with_the_first(tmp_path: Path) -> None:
    curves = ["history", "unique items, full"]
    scaling(tmp_path / "out", curves, quick=True, here=True, results=tmp_path)
    records = lines_of(tmp_path, "scaling")
    assert [record["curve"] for record in records] == [name for name in curves for _ in range(2)]
    first, second, few, many = records
    assert first["slower_than_first"]["median"] == 1.0
    # As many impressions with three times the history, and more distinct items to encode.
    assert second["counts"]["history"] == 3 * first["counts"]["history"]
    assert few["x"] < many["x"] and few["counts"]["encoded"] < many["counts"]["encoded"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (compare, "no variant .'fast'.*bank_lora"),
        (partial(ladder, setting="A"), "no row .'fast'.*memory bank"),
        (scaling, "no curve .'fast'.*batch size"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(
    command: Any, message: str, tmp_path: Path
) -> None:
    names = {"curves" if command is scaling else "only": ["fast"]}
    with pytest.raises(ValueError, match=message):
        command(tmp_path, quick=True, results=tmp_path, **names)


@pytest.mark.parametrize("command", [compare, throughput, ladder, scaling])
def test_quick_figures_never_replace_real_ones(command: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--quick.*--results"):
        command(tmp_path, quick=True)


def test_what_starts_its_own_ranks_refuses_to_be_started_on_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (lambda: ladder(tmp_path, quick=True), lambda: scaling(tmp_path, quick=True)):
        with pytest.raises(ValueError, match="--nproc 1"):
            call()
