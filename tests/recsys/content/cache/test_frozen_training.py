"""A model trains and predicts to the same bits whether frozen layers are cached or run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.build import build_job
from recsys.config import ContentSettings, FusionSettings, HistorySettings
from recsys.data.item_frequency import ItemCounts
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import evaluate_split, fill_bank
from tests.datasets import write_dataset
from tests.recsys.content.cache.frozen_outputs import modality_of
from tests.recsys.em3_runs import STEPS, em3_config, rows_of_step

CASES = [
    ("text", "lora", "none"),
    ("poster", "lora", "mean"),
    ("text", "frozen", "mean"),  # all layers
    ("poster", "frozen", "cls"),
    ("text", "side", "mean"),
    ("poster", "side", "cls"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    return tmp_path


def content_of(name: str, training: str, pooling: str, is_cached: bool) -> ContentSettings:
    modality = modality_of(name, training, pooling)
    modality.cache_frozen_layers = is_cached
    return ContentSettings(
        modalities={name: modality},
        dim=16,
        fusion=FusionSettings(num_heads=2, dropout=0.0),
        history=HistorySettings(lora_rank=2),
    )


def trained(folder: Path, content: ContentSettings) -> dict[str, Any]:
    """All that three steps give, and what the model then says of the test split."""
    config = em3_config(folder, content=content)
    recorded: dict[str, Any] = {}
    with joined_ranks("cpu") as ranks:
        job = build_job(config, str(folder / "data"), ranks)
        fill_bank(job)
        job.model.train()
        for step in range(STEPS):
            job.pipeline.update.optimizer.zero_grad()
            batch = job.batch_builder()(rows_of_step(job.root, job.schema, step, 0, 1))
            loss, (_, logits, _) = job.model(batch)
            loss.backward()
            recorded |= {f"loss {step}": loss.detach().clone(), f"logits {step}": logits.detach()}
            for name, parameter in job.em3.named_parameters():
                if parameter.grad is not None:
                    recorded[f"gradient {step} of {name}"] = parameter.grad.clone()
            job.pipeline.update.optimizer.step()
        for name, parameter in job.em3.named_parameters():
            if parameter.requires_grad:
                recorded[f"trained {name}"] = parameter.detach().clone()
        num_items = job.schema.num_items
        counts = ItemCounts(np.arange(num_items), np.full(num_items, 5))
        recorded["report"] = evaluate_split(job, "test", counts)
    return recorded


@pytest.mark.parametrize(("name", "training", "pooling"), CASES)
def test_steps_gradients_weights_and_metrics_are_equal_to_the_last_bit(
    folder: Path, name: str, training: str, pooling: str
) -> None:
    expected = trained(folder, content_of(name, training, pooling, is_cached=False))
    assert not list((folder / "cache").glob("frozen-*"))
    cached = trained(folder, content_of(name, training, pooling, is_cached=True))
    assert list((folder / "cache").glob("frozen-*"))
    assert cached.keys() == expected.keys()
    assert any(".encoders." in key for key in cached) == (training != "frozen")
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(cached[key], value), key
        else:
            assert cached[key] == value, key
