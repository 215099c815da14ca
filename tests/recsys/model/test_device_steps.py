"""Steps on a device give the logits of a CPU; on a GPU they do so without waiting for it.

Initial weights of tables are drawn on the device, so those of the CPU are copied.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.build import Job, build_job
from recsys.config import Config, OptimizerSettings, content_settings
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import fill_bank
from tests.datasets import write_dataset
from tests.recsys.em3_runs import batches_of, table_weights
from tests.recsys.ranking.backbone_runs import backbone_config

STEPS, WARM_UP = 5, 2
AVERAGES = OptimizerSettings(ema_decay=0.9, ema_tables=True)
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "hstu": ("hstu", {}, 1e-4),
    "transformer": ("transformer", {}, 1e-4),
    "sim": ("sim", {}, 1e-4),
    "averages": ("din_dcn", {"optimizer": AVERAGES}, 1e-4),
    "tf32": ("din_dcn", {"tf32": True}, 1e-2),
    "bf16": ("din_dcn", {"precision": "bf16"}, 5e-2),
    "top_k": ("din_dcn", {}, 1e-4),
    "compiled": ("din_dcn", {"compile": "auto"}, 1e-3),  # on a GPU
    "compiled hstu": ("hstu", {"compile": "auto"}, 1e-3),
    "half": ("din_dcn", {}, 1e-2),  # rounded by chance on a GPU
    "bounded": ("din_dcn", {}, 1e-4),  # rows are reset as other ids take them
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    write_dataset(folder / "data")
    schema = write_dataset(folder / "bounded") / "schema.yaml"
    rows = "num_embeddings: 10", "num_embeddings: 6, vocabulary: {kind: bounded}"
    schema.write_text(schema.read_text().replace(*rows))
    return folder


def config_of(folder: Path, name: str) -> Config:
    backbone, settings, _ = CASES[name]
    settings = {"compile": False, "sharding": "auto", "kernels": "torch", **settings}
    config = backbone_config(folder, backbone, "qformer", **settings)
    content = content_settings(config.content)
    assert content is not None
    if name == "half":
        config.embedding.precision = "fp16"
    if name == "top_k":
        content = replace(content, history=replace(content.history, top_k=2))
    return replace(config, content=content)


def trained(
    job: Job, tables: list[Tensor] | None, steps: int, rows: int
) -> tuple[list[Tensor], Any]:
    """Logits of each step on the host, and the tables before the first."""
    for weight, initial in zip(table_weights(job), tables or []):
        weight.copy_(initial)
    old_weights = [weight.detach().cpu().clone() for weight in table_weights(job)]
    fill_bank(job)
    batches = batches_of(job, steps, rows)
    if job.ranks.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    prepared = job.preparation(iter(batches), UnknownIds(job.schema), 0, training=True)
    job.model.train()
    logits = []
    for step in range(steps):
        if job.ranks.device.type == "cuda" and step == WARM_UP:
            torch.cuda.set_sync_debug_mode("error")
        logits.append(job.pipeline.progress(prepared)[1].detach())
    if job.ranks.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return [values.float().cpu() for values in logits], old_weights


@pytest.mark.parametrize("name", CASES)
def test_steps_on_a_device_give_the_logits_of_a_cpu(folder: Path, device: str, name: str) -> None:
    config, tables, logits = config_of(folder, name), None, []
    data = folder / ("bounded" if name == "bounded" else "data")
    for target in ("cpu", device):
        with joined_ranks(target) as ranks:  # type: ignore[arg-type]
            job = build_job(config, str(data), ranks)
            # A row whose user was seen lately is kept: others need many steps of few users.
            sizes = (20, 1) if name == "bounded" else (STEPS, 10)
            logits_of_steps, tables = trained(job, tables, *sizes)
            logits.append(logits_of_steps)
            evicted = [table.counts().evicted for table in job.vocabularies.by_table.values()]
            assert (sum(evicted) > 0) == (name == "bounded")
    tolerance = CASES[name][2] if device == "cuda" else 0.0
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=tolerance)
