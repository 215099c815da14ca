"""Which runs the study makes, what it refuses before the first, and that none is made twice."""

from pathlib import Path

import pytest

from benchmarks.quality.__main__ import quality
from benchmarks.quality.grid import GRIDS, Cell, chosen_cells
from benchmarks.quality.runs import RECIPE, finished, in_order, plan_runs, resolved
from tests.benchmarks.quality.quality_cells import use_small_grid, write_runs, write_windows
from tests.recsys.command_runs import TINY


def test_equal_configurations_share_their_runs_and_other_data_do_not(tmp_path: Path) -> None:
    by_name = {"recipe": {}, "same": {"batch_size": 256}, "other": {"batch_size": 32}}
    data = {"window-1": "a", "window-2": "b"}
    plan = plan_runs(by_name, data, tmp_path, TINY, seeds=range(2))
    first, equal, other = (plan[name] for name in by_name)

    assert [run.folder for run in first[0]] == [run.folder for run in equal[0]]
    assert len(in_order(plan)) == 2 * 2 * 2
    assert [run.seed for run in in_order(plan)] == [0] * 4 + [1] * 4
    folders = [run.folder for by_seed in (first, other) for run in by_seed[0]]
    assert len({folder.name for folder in folders}) == 4
    assert [folder.parent.name for folder in folders[:2]] == ["window-1", "window-2"]


def test_a_study_can_continue_at_a_later_seed(tmp_path: Path) -> None:
    plan = plan_runs({"recipe": {}}, {"window-1": "a"}, tmp_path, TINY, seeds=range(2))
    later = plan_runs({"recipe": {}}, {"window-1": "a"}, tmp_path, TINY, seeds=range(1, 3))

    assert [run.seed for run in in_order(later)] == [1, 2]
    assert in_order(later)[0].folder == in_order(plan)[1].folder


def test_a_seed_counts_once_it_is_finished_on_every_window(tmp_path: Path) -> None:
    plan = write_runs(write_windows(tmp_path / "data"), tmp_path / "runs")
    (plan["content"][0][1].folder / "scores_test.parquet").unlink()
    (plan["ID only"][0][0].folder / "metrics.json").unlink()
    (plan["ID only"][1][0].folder / "metrics.json").unlink()

    complete = finished(plan)

    assert list(complete) == ["content"]
    assert [run.seed for run in complete["content"][0]] == [1, 1]


@pytest.mark.parametrize("grid", list(GRIDS))
def test_the_recipe_takes_the_settings_of_each_cell(grid: str) -> None:
    recipe = RECIPE.with_name("ifdb.yaml") if grid == "ifdb" else RECIPE
    assert all(resolved(recipe, cell.settings) for cell in GRIDS[grid])


def test_what_is_wrong_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = str(write_windows(tmp_path / "data")), tmp_path / "runs"
    with pytest.raises(ValueError, match=r"--grid small.*'parts'"):
        quality(data, out, grid="small")
    with pytest.raises(ValueError, match=r"\['CIC'\].* grid text.*'ID only'"):
        chosen_cells("text", ["CIC"])
    with pytest.raises(ValueError, match="--seeds 0"):
        quality(data, out, seeds=0)
    with pytest.raises(ValueError, match="--first_seed -1"):
        quality(data, out, first_seed=-1)
    use_small_grid(monkeypatch)
    with pytest.raises(ValueError, match="--train false"):
        quality(data, out, grid="small", recipe=TINY, train=False)
    unchanged = Cell("same", "", {"epochs": 1}, "recipe")
    monkeypatch.setitem(GRIDS, "same", [Cell("recipe", "", {}), unchanged])
    with pytest.raises(ValueError, match=r"'same'.*'recipe'"):
        quality(data, out, grid="same", recipe=TINY)
    monkeypatch.setitem(GRIDS, "wrong", [Cell("typo", "", {"rankin.dropout": 1})])
    with pytest.raises(ValueError, match=r"'typo': config .*rankin.dropout"):
        quality(data, out, grid="wrong", recipe=TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc 1"):
        quality(data, out)
    assert not out.exists()
