"""Adapters and trained encoders of every kind under DistributedModelParallel, on two ranks.

Replicas of what trains must agree, and a checkpoint must bring all of it back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.build import Job, build_job
from recsys.checkpoint.manager import Checkpoints, load_best
from recsys.checkpoint.progress import Progress
from recsys.config import Config, ContentSettings, LoraSettings, ModalitySettings
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import Run, batches_of, em3_config, train_configs

BERT, VISION_TARGETS = ["query", "value"], ["q_proj", "v_proj"]
# By name: settings of the text, or of the image, that is encoded.
MODALITIES: dict[str, dict[str, Any]] = {
    "bert, lora": {"encoder": "random:bert", "training": "lora"},
    "bert, dora": {
        "encoder": "random:bert",
        "training": "lora",
        "lora": LoraSettings(rank=2, use_dora=True, layers=[0, 1]),
    },
    "bert, pissa": {
        "encoder": "random:bert",
        "training": "lora",
        "lora": LoraSettings(rank=2, init_lora_weights="pissa", use_rslora=True),
    },
    "clip, lora": {"encoder": "random:clip", "training": "lora", "pooling": "projected"},
    "siglip, lora": {"encoder": "random:siglip", "training": "lora", "pooling": "projected"},
    "vit, lora": {"encoder": "random:vit", "training": "lora"},
    "bert, full": {"encoder": "random:bert", "training": "full"},
    "clip, full": {"encoder": "random:clip", "training": "full", "pooling": "projected"},
    "siglip images, full": {"encoder": "random:siglip", "training": "full"},
}


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    is_image = name.split(",")[0] in ("vit", "siglip images")
    settings = MODALITIES[name]
    lora = LoraSettings(rank=2, targets=BERT if "bert" in name else VISION_TARGETS)
    modality = ModalitySettings(
        kind="image" if is_image else "text",
        column="poster" if is_image else "text",
        max_length=64 if name.startswith("siglip,") else 16,
        image_size=32,
        **{"lora": lora} | settings | changes,
    )
    config = em3_config(folder)
    assert isinstance(config.content, ContentSettings)
    content = replace(config.content, modalities={"it": modality})
    return replace(config, content=content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[Run]]:
    """Each kind on two ranks."""
    configs = {name: config_of(folder, name) for name in MODALITIES}
    rank_runs = run_on_ranks(train_configs, 2, folder, configs)
    return {name: [run[name] for run in rank_runs] for name in configs}


def encoder_parts(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if ".encoders." in name}


@pytest.mark.parametrize("name", MODALITIES)
def test_replicas_agree_and_all_that_trains_has_moved(
    runs: dict[str, list[Run]], name: str
) -> None:
    first, second = runs[name]
    trained = encoder_parts(first.dense)
    assert trained.keys() == encoder_parts(second.dense).keys()
    kinds = {part for key in trained for part in key.split(".") if part.startswith("lora_")}
    if "full" not in name:
        magnitudes = {"lora_magnitude_vector"} if "dora" in name else set()
        assert kinds == {"lora_A", "lora_B"} | magnitudes
    for key, value in trained.items():
        assert torch.equal(value, second.dense[key]), key
        gradients = [encoder_parts(step)[key] for step in first.gradients]
        assert any(gradient.any() for gradient in gradients), key
    for key, value in first.frozen_before.items():
        assert torch.equal(value, first.frozen_after[key]), key


def some_steps(job: Job) -> None:
    for batch in batches_of(job, 2, 8):
        job.optimizer.zero_grad()
        loss, _ = job.model(batch)
        loss.backward()
        job.optimizer.step()


@pytest.mark.parametrize("name", ["bert, dora", "bert, pissa"])
def test_adapters_come_back_from_a_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    with joined_ranks("cpu") as ranks:
        job = build_job(config_of(folder, name), str(folder / "data"), ranks)
        some_steps(job)
        checkpoints = Checkpoints(job, tmp_path, "data")
        try:
            checkpoints.save_best(Progress())
        finally:
            checkpoints.close()
        other = build_job(config_of(folder, name), str(folder / "data"), ranks)
        weights = encoder_parts(dict(job.em3.named_parameters()))
        content = other.em3.content
        assert content is not None
        stored = {f"content.encoders.it.{key}" for key in content.encoders["it"].rewritten}  # type: ignore[union-attr]
        assert bool(stored) == ("pissa" in name)
        with torch.no_grad():  # base weights too: another processor may start with others
            for key, value in encoder_parts(dict(other.em3.named_parameters())).items():
                if value.requires_grad or key in stored:
                    value.add_(0.1)
        load_best(other, tmp_path)
        for key, value in encoder_parts(dict(other.em3.named_parameters())).items():
            assert torch.equal(value, weights[key]), key
