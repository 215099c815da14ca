"""What content gains by the share of unseen items: one point for each window."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.runs import plan_runs, windows
from benchmarks.quality.unseen_shares import CELLS, unseen_shares
from tests.benchmarks.quality.quality_cells import scores, write_run, write_windows
from tests.recsys.command_runs import TINY


def test_each_window_is_a_point_with_its_share_and_gain(tmp_path: Path) -> None:
    data = write_windows(tmp_path / "data")
    plan = plan_runs(CELLS, windows(str(data)), tmp_path / "runs" / "Small", TINY, [0])
    for cell, gain in {"ID only": 0.0, "recipe": 1.0}.items():
        for window, run in enumerate(plan[cell][0]):
            write_run(run.folder, scores(window, 0, gain), 0.6)

    unseen_shares(
        {"Small": str(data)}, tmp_path / "runs", {"Small": TINY}, results=tmp_path / "page"
    )

    lines = (tmp_path / "page" / "unseen_shares.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["window"] for record in records] == ["window-1", "window-2"]
    for window, record in enumerate(records):
        rows = scores(window, 0, 0.0)
        assert record["share"] == pytest.approx(np.mean(rows.counts[rows.labels[:, 0] > 0] == 0))
        value, lower, upper = record["gains"]["all"]
        assert 0 < lower < value < upper
    assert (tmp_path / "page" / "unseen_shares.png").exists()


def test_a_recipe_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no data"):
        unseen_shares({"Small": "data"}, tmp_path, {"Large": TINY})
