"""The benchmark of indexes compares each with exact search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.retrieval.indexes import retrieval


def test_indexes_are_compared_with_exact_search(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    retrieval(items=3000, dim=16, queries=20, results=tmp_path)

    text = (tmp_path / "retrieval.jsonl").read_text()
    records = {record["index"]: record for record in map(json.loads, text.splitlines())}
    assert list(records) == ["flat", "ivf", "hnsw"]
    assert records["flat"]["recall"] == {"10": 1.0, "100": 1.0}
    assert records["flat"]["passes"] is None and records["hnsw"]["passes"] is not None
    assert records["hnsw"]["recall"]["10"] > 0.95 and records["ivf"]["recall"]["10"] > 0.5
    for record in records.values():
        assert record["speed_up"] == pytest.approx(records["flat"]["p50"] / record["p50"])
    assert "hnsw" in (tmp_path / "retrieval.md").read_text()
