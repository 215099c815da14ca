"""Benchmarks of a catalogue that changes: its memory, and the first rows of new items."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.churn import QUICK, churn, growth_of, raw_ids, write_partition
from benchmarks.continual.new_rows import RULES, Protocol, _result
from benchmarks.results import write_result
from recsys.data.filesystem import Location
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.evaluation.scores import SplitScores


def test_a_tenth_of_the_items_of_a_day_is_new_and_a_third_of_all_has_room(tmp_path: Path) -> None:
    for day in range(2):
        write_partition(tmp_path, QUICK, day)
    schema = load_schema(Location.of(tmp_path))
    items = ItemTable(Location.of(tmp_path), schema)
    assert sorted(items.ids) == sorted(raw_ids(np.arange(66)))
    assert schema.num_items == QUICK.all_items // 3 == (60 + 4 * 6) // 3


def test_memory_grows_from_the_second_to_the_last_fifth() -> None:
    assert growth_of([50, 100, 104, 103, 110]) == 1.1


@pytest.mark.long
def test_items_come_and_go_in_one_process(tmp_path: Path) -> None:
    churn(tmp_path, quick=True, results=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "churn.jsonl").read_text().splitlines()]
    assert [record["partition"] for record in records] == list(range(QUICK.partitions))
    assert all(record["evicted"] > 0 for record in records)
    assert "](churn.png)" in (tmp_path / "churn.md").read_text()


def scores_of(noise: float) -> SplitScores:
    random = np.random.default_rng(0)
    rows = np.arange(120)
    labels = random.integers(2, size=(120, 1)).astype(np.float32)
    logits = (labels + noise * random.normal(size=(120, 1))).astype(np.float32)
    return SplitScores(rows, rows // 6, rows, rows % 7, labels, logits, ("liked",))


def test_rules_are_compared_with_random_on_the_same_rows(tmp_path: Path) -> None:
    scores = dict(zip(RULES, ([scores_of(noise)] for noise in (9.0, 9.0, 0.1)), strict=True))
    write_result(_result([Protocol("continual", scores)]), tmp_path)
    page = (tmp_path / "new_rows.md").read_text()
    random, mean, content = (line for line in page.splitlines() if line.startswith("| continual"))
    assert "(" not in random
    assert "(+0.0000 [+0.0000, +0.0000])" in mean
    record = json.loads((tmp_path / "new_rows.jsonl").read_text().splitlines()[2])
    value, low, _ = record["gauc cold, difference"]
    assert 0 < low < value and f"({value:+.4f}" in content
    assert record["rows"] == {"all": 120, "cold": 86, "unseen": 18}
