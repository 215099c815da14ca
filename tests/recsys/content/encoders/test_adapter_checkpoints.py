"""A checkpoint brings back adapters."""

from dataclasses import replace
from pathlib import Path

import torch

from recsys.build import Job, build_job
from recsys.checkpoint.manager import Checkpoints, load_best
from recsys.checkpoint.progress import Progress
from recsys.config import Config, ContentSettings, LoraSettings, ModalitySettings
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.recsys.em3_runs import batches_of, em3_config


def config_of(folder: Path) -> Config:
    text = ModalitySettings(
        "text",
        "text",
        encoder="random:bert",
        training="lora",
        lora=LoraSettings(rank=2, use_dora=True, layers=[0, 1]),
        max_length=16,
    )
    config = em3_config(folder)
    assert isinstance(config.content, ContentSettings)
    return replace(config, content=replace(config.content, modalities={"it": text}))


def encoder_tensors(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if ".encoders." in name}


def some_steps(job: Job) -> None:
    for batch in batches_of(job, 2, 8):
        job.pipeline.update.optimizer.zero_grad()
        loss, _ = job.model(batch)
        loss.backward()
        job.pipeline.update.optimizer.step()


def test_adapters_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    data = str(write_dataset(tmp_path / "data"))
    with joined_ranks("cpu") as ranks:
        job = build_job(config_of(tmp_path), data, ranks)
        some_steps(job)
        checkpoints = Checkpoints(job, tmp_path / "run", "data")
        try:
            checkpoints.save_best(Progress())
        finally:
            checkpoints.close()
        other = build_job(config_of(tmp_path), data, ranks)
        weights = encoder_tensors(dict(job.em3.named_parameters()))
        with torch.no_grad():
            for value in encoder_tensors(dict(other.em3.named_parameters())).values():
                if value.requires_grad:
                    value.add_(0.1)
        load_best(other, tmp_path / "run")
        for key, value in encoder_tensors(dict(other.em3.named_parameters())).items():
            assert torch.equal(value, weights[key]), key
