"""The setting `tf32` holds for every product of float32 matrices of the job."""

from pathlib import Path

import pytest
import torch

from recsys.build import build_job
from recsys.config import load_config
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY


@pytest.mark.parametrize("tf32", [True, False])
def test_a_job_sets_the_precision_of_products(tmp_path: Path, tf32: bool) -> None:
    data = write_dataset(tmp_path / "data")
    words = ["--content", "none", "--contrastive.weight", "0", "--device", "cpu"]
    with joined_ranks("cpu") as ranks:
        build_job(load_config(TINY, [*words, "--tf32", str(tf32).lower()]), str(data), ranks)
    try:
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision("highest")
