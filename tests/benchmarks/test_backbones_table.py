"""The table of backbones: finished runs are read, not made again, and differences are by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.backbones import BACKBONES, CONTENTS, backbones
from benchmarks.quality.runs import QualityRun, train_all
from recsys.ranking import RANKING_MODELS


def metrics(auc: float, recall: float | None = None) -> dict[str, Any]:
    """Test metrics where cold items are worse by 0.1, and unseen ones not defined."""
    cold = {"auc": auc - 0.1, "gauc": auc - 0.2}
    test: dict[str, Any] = {"auc": auc, "gauc": auc - 0.1, "cold": cold}
    test["unseen"] = {"auc": None, "gauc": None}
    if recall is not None:
        found = {"recall@50": recall, "ndcg@50": recall / 2}
        test["retrieval"] = {**found, "cold": found, "unseen": found, "catalogue": 1234}
    return test


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Three seeds of din and of two_tower, with and without content."""
    values = {
        "din id_only": [0.7, 0.6, 0.65],
        "din content": [0.74, 0.7, 0.66],
        "two_tower id_only": [0.5, 0.5, 0.5],
        "two_tower content": [0.4, 0.5, 0.6],
    }
    for name, of_seeds in values.items():
        for seed, auc in enumerate(of_seeds):
            folder = tmp_path / f"{name.replace(' ', '_')}-{seed}"
            folder.mkdir()
            test = metrics(auc, recall=0.3 if "two_tower" in name else None)
            (folder / "metrics.json").write_text(json.dumps({"test": test}))
    return tmp_path


def test_the_page_has_medians_gains_by_seed_and_retrieval(finished: Path) -> None:
    names = ["din", "two_tower"]
    backbones("no data needed", finished, only=names, results=finished / "results")
    lines = (finished / "results" / "backbones.md").read_text().splitlines()
    assert "| din | ID only | 0.6500 | 0.5500 | - | 0.5500 | 0.4500 | - |" in lines
    assert "| din | content | 0.7000 | 0.6000 | - | 0.6000 | 0.5000 | - |" in lines
    gain = next(line for line in lines if line.startswith("| din | +"))
    assert gain.startswith("| din | +0.0400 (+0.010, +0.100) |")
    assert any("1,234 items" in line for line in lines)
    assert lines[-1] == "| two_tower | content | " + "0.3000 | " * 3 + "0.1500 | 0.1500 | 0.1500 |"


def test_every_backbone_of_the_package_has_a_row_with_and_without_content() -> None:
    assert {name.split(",")[0] for name in BACKBONES} == set(RANKING_MODELS)
    assert list(CONTENTS) == ["ID only", "content"]


def test_an_unknown_backbone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['xgboost'\].*\['din_dcn'"):
        backbones("data", tmp_path, only=["xgboost"])


def test_a_run_that_fails_names_its_log(tmp_path: Path) -> None:
    run = QualityRun("din", 0)
    with pytest.raises(RuntimeError, match=r"din-0 .*din-0/log.txt"):
        train_all([run], str(tmp_path / "nothing"), tmp_path)
    assert "nothing/schema.yaml" in (tmp_path / "din-0" / "log.txt").read_text()
