"""Benchmarks of sequence models at sizes of seconds; forms of attention give equal numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sequences.__main__ import MODELS, Growth, sequences
from benchmarks.sequences.forms import forms


def test_a_step_may_take_six_times_as_long_with_long_histories() -> None:
    growths = [Growth(name, True, (10.0, long)) for name in MODELS for long in (60.0, 61.0)]
    assert {growth.model: growth.passes for growth in growths[::2]} == {
        name: True if name in ("hstu", "transformer") else None for name in MODELS
    }
    assert [growth.passes for growth in growths[1::2]].count(False) == 2


def test_forms_of_attention_are_compared(tmp_path: Path) -> None:
    forms(rows=10, dim=8, longest=(5,), rounds=1, results=tmp_path)
    (record,) = map(json.loads, (tmp_path / "sequence_forms.jsonl").read_text().splitlines())
    assert {"masked", "padded SDPA", "buckets"} <= record["milliseconds"].keys()


@pytest.mark.long
def test_steps_of_both_lengths_are_measured(tmp_path: Path) -> None:
    sequences(tmp_path, 16, rounds=1, only=["hstu"], quick=True, results=tmp_path / "results")
    lines = (tmp_path / "results" / "sequences.jsonl").read_text().splitlines()
    assert [json.loads(line)["content"] for line in lines] == [False, True]
