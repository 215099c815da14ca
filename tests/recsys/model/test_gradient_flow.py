"""Each loss alone trains the fusion, the LoRA inside the encoder and the sharded ID table."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.build import build_job
from recsys.config import ContrastiveSettings, ranking_settings
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, em3_config, ranks_of, table_shards

SMALL = {"attention_units": [8], "cross_layers": 1, "cross_rank": 4, "mlp_units": [8]}
ONLY: dict[str, dict[str, Any]] = {
    "ranking loss": {"contrastive": ContrastiveSettings(weight=0.0)},
    "in_batch": {
        "ranking": ranking_settings(**SMALL, label_weights={"liked": 0.0}),  # type: ignore[arg-type]
        "contrastive": ContrastiveSettings(weight=1.0, dim=8),
    },
    "published": {
        "ranking": ranking_settings(**SMALL, label_weights={"liked": 0.0}),  # type: ignore[arg-type]
        "contrastive": ContrastiveSettings(weight=1.0, dim=8, variant="published"),
    },
}
CASES = [(loss, preset) for loss in ONLY for preset in ("modern", "published")]


def gradients(rank: int, world_size: int, folder: Path) -> dict[Any, dict[str, float]]:
    return {case: _gradients(rank, world_size, folder, *case) for case in CASES}


def _gradients(
    rank: int, world_size: int, folder: Path, loss_name: str, preset: str
) -> dict[str, float]:
    """Largest gradient by parameter after one step; of the item table what SGD moved it by."""
    config = em3_config(folder, **ONLY[loss_name])
    config.content.fusion.preset = preset  # type: ignore[union-attr, assignment]
    job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
    first = table_shards(job)["item"]
    loss, _ = job.model(batches_of(job, 1, 8)[0])
    loss.backward()
    last = table_shards(job)["item"]
    gradients_by_name = {
        name: float(parameter.grad.abs().max())
        for name, parameter in job.em3.named_parameters()
        if parameter.grad is not None
    }
    moved = [(new - old).abs().max() for (_, old), (_, new) in zip(first, last, strict=True)]
    return gradients_by_name | {"item table": float(torch.stack(moved).max())}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("gradients")
    write_dataset(folder / "data")
    return run_on_ranks(gradients, 2, folder)


@pytest.mark.parametrize("case", CASES, ids=[" ".join(case) for case in CASES])
def test_one_loss_alone_reaches_fusion_lora_and_the_sharded_table(by_rank: Any, case: Any) -> None:
    for rank in by_rank:
        gradients_by_name = rank[case]
        fusion = [name for name in gradients_by_name if name.startswith("content.fusion.")]
        # A starts as noise and B as zero, so that only B has a gradient in the first step.
        lora = [name for name in gradients_by_name if "encoders.text" in name and "lora_B" in name]
        assert "content.fusion.queries" in fusion and lora
        for name in lora:
            assert gradients_by_name[name] > 1e-7, name
        # So does what the queries of `modern` say, but for its last map.
        assert gradients_by_name["content.fusion.output.weight"] > 1e-6
        assert gradients_by_name["item table"] > 1e-6


@pytest.mark.parametrize("preset", ["modern", "published"])
def test_the_ranking_loss_reaches_the_low_rank_map_of_the_history(
    by_rank: Any, preset: str
) -> None:
    gradients_by_name = by_rank[0]["ranking loss", preset]
    # The bank is filled by this very step, so that its vectors are not zero.
    assert gradients_by_name["content.history_map.map.lora_B.default.weight"] > 1e-7
