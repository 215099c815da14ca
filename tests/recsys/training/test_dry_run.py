"""A dry run takes one step of training and one of scoring, on any ranks, and writes no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.cli import main
from recsys.training.dry_run import DryRun, dry_run
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import train_words
from tests.recsys.em3_runs import em3_config, ranks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dry_run")
    write_dataset(place / "data", {"train": 64, "valid": 32, "test": 20})
    return place


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.parts}


def steps_on(rank: int, world_size: int, folder: Path) -> DryRun:
    return dry_run(em3_config(folder), str(folder / "data"), ranks_of(rank, world_size))


def test_one_step_on_each_rank_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(folder)
    words = train_words(folder / "data", folder / "run", "--dry-run")
    place = words.index("--out")
    assert main([*words[:place], *words[place + 2 :]]) == 0

    assert files_of(folder) == before
    printed = capsys.readouterr().out
    assert "dry run: " in printed and " 8 rows on 1 rank" in printed
    assert "32 validation rows" in printed


def test_ranks_agree_on_losses_and_tell_each_their_memory(folder: Path) -> None:
    first, second = run_on_ranks(steps_on, 2, folder)

    assert first.losses == second.losses
    weight = em3_config(folder).contrastive.weight
    total = first.losses["ranking"] + weight * first.losses["contrastive"]
    assert first.losses["loss"] == pytest.approx(total, rel=1e-5)
    assert first.peak_bytes == second.peak_bytes and len(first.peak_bytes) == 2
    assert all(peak > 2**26 for peak in first.peak_bytes)  # torch alone takes more
    assert " GiB " in str(first)


def test_a_run_needs_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(folder / "data", folder / "run")
    place = words.index("--out")
    assert main([*words[:place], *words[place + 2 :]]) == 1
    assert "train needs --out" in capsys.readouterr().err
