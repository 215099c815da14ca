"""A DLRM on random batches or on Criteo's files, in a loop as TorchRec's users write it.

torchrun --nproc-per-node 2 dlrm_before.py
torchrun --nproc-per-node 2 dlrm_before.py --criteo FOLDER  # day_N_{dense,sparse,labels}.npy
"""

import argparse
import os
from glob import glob

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.criteo import (
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    InMemoryBinaryCriteoIterDataPipe,
)
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import (
    EmbeddingShardingPlanner,
    ParameterConstraints,
    Topology,
)
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

PARTS = ("dense", "sparse", "labels")


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--criteo", help="folder with npy files; without it batches are random")
    parser.add_argument("--num_embeddings", type=int, default=50)
    parser.add_argument("--embedding_dim", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=10, help="per rank and epoch, if random")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=0.02)
    return parser.parse_args()


def data_loader(args, stage):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.criteo:
        # The last day is cut into validation and test.
        days = {part: sorted(glob(f"{args.criteo}/*_{part}.npy")) for part in PARTS}
        stage_days = {p: d[:-1] if stage == "train" else d[-1:] for p, d in days.items()}
        dataset = InMemoryBinaryCriteoIterDataPipe(
            stage,
            *(stage_days[part] for part in PARTS),
            batch_size=args.batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=True,
            hashes=[args.num_embeddings] * len(DEFAULT_CAT_NAMES),
        )
    else:
        dataset = RandomRecDataset(
            keys=DEFAULT_CAT_NAMES,
            batch_size=args.batch_size,
            hash_size=args.num_embeddings,
            ids_per_feature=1,
            num_dense=len(DEFAULT_INT_NAMES),
            manual_seed=2 * rank + (stage == "train"),
            num_batches=args.batches,
        )
    return DataLoader(dataset, batch_size=None, pin_memory=torch.cuda.is_available())


def build_model(args, device):
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=args.num_embeddings,
            embedding_dim=args.embedding_dim,
            feature_names=[name],
        )
        for name in DEFAULT_CAT_NAMES
    ]
    return DLRM(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=len(DEFAULT_INT_NAMES),
        dense_arch_layer_sizes=[32, args.embedding_dim],
        over_arch_layer_sizes=[32, 1],
        dense_device=device,
    )


def shard(train_model, args, device):
    apply_optimizer_in_backward(
        RowWiseAdagrad, train_model.model.sparse_arch.parameters(), {"lr": args.learning_rate}
    )
    # Tables this small would else be data-parallel and leave their fused optimizer.
    cut = ParameterConstraints(sharding_types=["table_wise", "column_wise"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        batch_size=args.batch_size,
        constraints={f"t_{name}": cut for name in DEFAULT_CAT_NAMES},
    )
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(train_model, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(train_model, device=device, plan=plan, sharders=sharders)
    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adagrad(parameters, lr=args.learning_rate),
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense_optimizer])


def run(pipeline, batches, auroc=None):
    """All batches once; the mean loss."""
    losses, iterator = [], iter(batches)
    while True:
        try:
            loss, logits, labels = pipeline.progress(iterator)
        except StopIteration:
            return float(torch.stack(losses).mean())
        losses.append(loss)
        if auroc is not None:
            auroc.update(logits.sigmoid(), labels)


def main():
    args = parse_arguments()
    use_cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if use_cuda else "cpu")
    dist.init_process_group("nccl" if use_cuda else "gloo")
    torch.manual_seed(0)

    dlrm = build_model(args, device)
    train_model = DLRMTrain(dlrm)
    model, optimizer = shard(train_model, args, device)
    pipeline = TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)
    loaders = {stage: data_loader(args, stage) for stage in ("train", "val")}

    for epoch in range(args.epochs):
        model.train()
        loss = run(pipeline, loaders["train"])
        model.eval()
        auroc = BinaryAUROC().to(device)
        with torch.no_grad():
            run(pipeline, loaders["val"], auroc)
        auc = float(auroc.compute())
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: training loss {loss:.4f}, validation AUC {auc:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
