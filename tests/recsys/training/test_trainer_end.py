"""What a run leaves in memory when it has ended."""

from __future__ import annotations

import gc
from pathlib import Path

from recsys.config import load_config
from recsys.distributed.ranks import joined_ranks
from recsys.training.train import train
from recsys.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY


def test_the_trainer_is_freed_with_its_run_and_not_by_garbage_collection(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    config = load_config(TINY, ["--batch_size", "8", "--device", "cpu", "--content", "none"])
    gc.collect()
    gc.disable()
    try:
        with joined_ranks("cpu") as ranks:
            train(config, str(data), tmp_path / "run", ranks)
        assert not [kept for kept in gc.get_objects() if isinstance(kept, Trainer)]
    finally:
        gc.enable()
