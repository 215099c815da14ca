"""The map from encoder outputs to the content dimension, and checkpoints from before its scale."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from recsys.build import build_job
from recsys.checkpoint.state import model_state
from recsys.content.projection import Projection
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.recsys.em3_runs import em3_config


def test_it_is_a_linear_map_of_shifted_and_scaled_inputs() -> None:
    projection, inputs = Projection(6, 4), torch.randn(3, 5, 6)
    plain = nn.Linear(6, 4)
    plain.load_state_dict(dict(projection.named_parameters()))
    assert torch.equal(projection(inputs), plain(inputs))

    projection.shift.copy_(torch.arange(6.0))
    projection.scale.fill_(0.5)

    assert torch.equal(projection(inputs), plain((inputs - torch.arange(6.0)) * 0.5))


def test_a_checkpoint_without_shift_and_scale_is_complete(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with joined_ranks("cpu") as ranks:
        job = build_job(em3_config(tmp_path), str(data), ranks)
        everything = model_state(job).keys()
        added = {name for name in everything if name.endswith((".shift", ".scale"))}
        assert len(added) == 4
        # Scales of numbers are left out, too, where a checkpoint has none.
        scales = {name for name in everything if name.startswith("model.scaling.")}
        assert model_state(job, dict.fromkeys(everything - added)).keys() == everything - added
        assert model_state(job, dict.fromkeys(everything)).keys() == everything
        # Others are never left out.
        assert model_state(job, dict.fromkeys(added)).keys() == everything - scales
