"""Small DLRMs as users have them, with content plugged in and without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.config import ContrastiveSettings, HistorySettings
from recsys.plug_in import PlugInSettings
from tests.recsys.em3_runs import em3_config

KINDS = ("dlrm", "dcn", "projection")
FEATURES = ("item", "viewed", "user")
NUM_ITEMS, DIM, NUM_DENSE, BATCH = 30, 8, 5, 6


def build_dlrm(kind: str, device: str = "meta") -> DLRM:
    """DLRM, DLRM_DCN or DLRM_Projection; its tables on `device`."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", num_embeddings=NUM_ITEMS, embedding_dim=DIM, feature_names=[name]
        )
        for name in FEATURES
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device(device))
    sizes: dict[str, Any] = {
        "embedding_bag_collection": collection,
        "dense_in_features": NUM_DENSE,
        "dense_arch_layer_sizes": [12, DIM],
        "over_arch_layer_sizes": [16, 1],
    }
    if kind == "dcn":
        return DLRM_DCN(**sizes, dcn_num_layers=2, dcn_low_rank_dim=4)
    if kind == "projection":
        branches = {f"interaction_branch{n}_layer_sizes": [10, n * DIM] for n in (1, 2)}
        return DLRM_Projection(**sizes, **branches)
    return DLRM(**sizes)


def plug_in_settings(folder: Path, **changed: Any) -> PlugInSettings:
    """Text with LoRA and a stored feature of the dataset in `folder / "data"`."""
    content: Any = replace(em3_config(folder).content, history=HistorySettings())  # type: ignore[type-var]
    values: dict[str, Any] = {
        "data": str(folder / "data"),
        "item": "item",
        "history": "viewed",
        "content": content,
        "contrastive": ContrastiveSettings(weight=0.5, dim=8),
        "cache": str(folder / "cache"),
    }
    return PlugInSettings(**(values | changed))


def user_batches(rank: int, count: int) -> list[Batch]:
    """Batches with one item and user and 0 to 3 viewed items in each row."""
    dataset = RandomRecDataset(
        keys=list(FEATURES),
        batch_size=BATCH,
        hash_size=NUM_ITEMS,
        ids_per_features=[1, 3, 1],
        min_ids_per_features=[1, 0, 1],
        num_dense=NUM_DENSE,
        manual_seed=rank,
        num_generated_batches=count,
        num_batches=count,
    )
    return list(dataset)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def shard(
    train_model: Any,
    world_size: int,
    dense_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    table_optimizer: type[torch.optim.Optimizer] = RowWiseAdagrad,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """A user's own DMP and optimizers: Adagrad in backward for tables, AdamW for the rest."""
    tables = train_model.model.sparse_arch.parameters()
    apply_optimizer_in_backward(table_optimizer, tables, {"lr": 0.05})
    table_wise = ParameterConstraints(sharding_types=["table_wise"])
    constraints = {f"t_{name}": table_wise for name in FEATURES}
    sharders: Any = [EmbeddingBagCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(train_model, sharders, torch.distributed.group.WORLD)
    model = DistributedModelParallel(
        train_model, device=torch.device("cpu"), plan=plan, sharders=sharders
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        dense_optimizer,
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])
