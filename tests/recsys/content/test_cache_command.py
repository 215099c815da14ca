"""`recsys cache` fills what `recsys train` then finds, alone and on two ranks."""

import re
from pathlib import Path

import numpy as np
import pytest

from recsys.cli import main
from recsys.data.items.ragged_array import RaggedArray
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, run_recsys, train_argv


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cache_command") / "data")


def cache_argv(data: Path, cache: Path) -> list[str]:
    argv = ["cache", "--config", str(TINY), "--data", str(data), "--cache", str(cache)]
    return [*argv, "--device", "cpu"]


def test_train_finds_what_cache_has_filled(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(cache_argv(data, tmp_path / "cache")) == 0
    assert "encoding 'text'" in capsys.readouterr().out
    assert main(train_argv(data, tmp_path / "run")) == 0
    assert "encoding" not in capsys.readouterr().out


def test_two_ranks_fill_the_same_bits_as_one(data: Path, tmp_path: Path) -> None:
    assert main(cache_argv(data, tmp_path / "alone")) == 0
    process = run_recsys(*cache_argv(data, tmp_path / "both"), ranks=2)
    assert process.returncode == 0, process.stderr
    assert len(re.findall(r"^text: 28 items", process.stdout, re.MULTILINE)) == 1
    (alone,), (shared,) = (list((tmp_path / name).glob("frozen-*")) for name in ("alone", "both"))
    assert alone.name == shared.name
    assert np.array_equal(RaggedArray(alone).values, RaggedArray(shared).values)
    assert np.array_equal(RaggedArray(alone).offsets, RaggedArray(shared).offsets)
