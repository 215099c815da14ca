"""A small model over every kind of table, and the same in plain PyTorch.

One sum-pooled and one mean-pooled table, and one without pooling that target item and history
share. The dense part is a single linear layer with fixed initial weights. Weights are of the
order of 0.1 because TorchRec's row-wise mean pooling divides by (length + 1e-6), and every other
pooled feature of that collection by (1 + 1e-6): a relative error that tests at 1e-6 would see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import (
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
    fuse_table_optimizers,
    plan_sharding,
    sharders,
)
from embeddings.table_sharders import CommunicationType
from embeddings.table_state import table_weights
from embeddings.tables import Kernel, Sharding, TableOptimizer, TablePrecision

DIM, SEED, STEPS, BATCH = 8, 11, 3, 4
FEATURES = ["user", "tags", "item", "history"]
# One batch per step, each feature a list of ids per row: empty lists, repeated ids, and rows of
# every table that only one of two ranks touches.
BATCHES: list[dict[str, list[list[int]]]] = [
    {
        "user": [[0], [9], [0], [4]],
        "tags": [[0, 1], [], [2], [1, 1]],
        "item": [[6], [1], [6], [3]],
        "history": [[0, 1, 2], [], [6], [5, 5]],
    },
    {
        "user": [[1, 2], [9], [5], [0]],
        "tags": [[2], [2, 0, 1], [], []],
        "item": [[0], [0], [2], [4]],
        "history": [[3], [1, 6], [0], []],
    },
    {
        "user": [[7], [], [9], [9]],
        "tags": [[], [1], [0], [2, 2]],
        "item": [[5], [6], [1], [1]],
        "history": [[], [2, 3, 4], [6, 0], [1]],
    },
]
RATES = {"user": 0.1, "tags": 0.05, "item": 0.07}  # learning rate of each table
LABELS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])


def table_configs(
    sharding: Sharding = "auto",
    optimizer: TableOptimizer = "sgd",
    learning_rate: float | None = None,
    kernel: Kernel = "fused",
    frozen: str = "",
    precision: TablePrecision = "fp32",
) -> list[TableConfig]:
    def table(name: str, rows: int, features: list[str], pooling: str) -> TableConfig:
        return TableConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=DIM,
            features=features,
            pooling=pooling,  # type: ignore[arg-type]
            sharding=sharding,
            optimizer=optimizer,
            learning_rate=learning_rate or RATES[name],
            init_std=0.1,
            frozen=name == frozen,
            kernel=kernel,
            precision=precision,
        )

    return [
        table("user", 10, ["user"], "sum"),
        table("tags", 3, ["tags"], "mean"),
        table("item", 7, ["item", "history"], "none"),
    ]


def jagged(step: int, rows: slice, device: torch.device | str = "cpu") -> KeyedJaggedTensor:
    """Some rows of a step's batch, as the collections take it."""
    lists = [ids for feature in FEATURES for ids in BATCHES[step][feature][rows]]
    return KeyedJaggedTensor(
        keys=FEATURES,
        values=torch.tensor([item for ids in lists for item in ids], device=device),
        lengths=torch.tensor([len(ids) for ids in lists], device=device),
    )


class TablesModel(nn.Module):
    """Logits [B] from the pooled vectors, the item's vector and the sum of the history's."""

    def __init__(self, tables: list[TableConfig], device: str = "meta") -> None:
        super().__init__()
        bags = build_embedding_bag_collection(tables, device)
        sequences = build_embedding_collection(tables, device)
        assert bags is not None and sequences is not None
        self.bags, self.sequences, self.dense = bags, sequences, nn.Linear(4 * DIM, 1)
        with torch.no_grad():
            self.dense.weight.copy_(torch.linspace(-1, 1, 4 * DIM)[None])
            self.dense.bias.fill_(0.1)

    def forward(self, ids: KeyedJaggedTensor) -> tuple[Tensor, dict[str, Tensor]]:
        pooled, sequences = self.bags(ids), self.sequences(ids)
        vectors = {
            "user": pooled["user"],
            "tags": pooled["tags"],
            "item": sequences["item"].values(),
            "history": sequences["history"].to_padded_dense(3).sum(dim=1),
        }
        return self.dense(torch.cat([vectors[name] for name in FEATURES], dim=1))[:, 0], vectors


def sharded_model(
    tables: list[TableConfig],
    model: TablesModel | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH,
    communication: tuple[CommunicationType, CommunicationType] = ("fp32", "fp32"),
) -> DistributedModelParallel:
    """The model, by default a new one, with its tables sharded over this job's ranks."""
    torch.manual_seed(SEED)
    model = TablesModel(tables) if model is None else model
    fuse_table_optimizers(model, tables)
    cuts = sharders(*communication)
    plan = plan_sharding(model, tables, device=device, batch_size=batch_size, module_sharders=cuts)
    return DistributedModelParallel(model, device=torch.device(device), plan=plan, sharders=cuts)


def rank_rows(rank: int, world_size: int) -> slice:
    """A rank's share of each batch."""
    size = BATCH // world_size
    return slice(rank * size, (rank + 1) * size)


@dataclass
class PlainRun:
    """What training in plain PyTorch gave: logits [steps, B] and the weights at the end."""

    logits: Tensor
    weights: dict[str, Tensor]


def initial_tables(device: str = "cpu") -> dict[str, Tensor]:
    """The tables' initial weights on that device, from unsharded collections, on the host."""
    torch.manual_seed(SEED)
    model = TablesModel(table_configs(), device=device)
    tables = {**model.bags.embedding_bags, **model.sequences.embeddings}
    return {name: holder.weight.detach().clone().cpu() for name, holder in tables.items()}


def train_in_plain_pytorch(
    optimizer: TableOptimizer, column_shards: int, device: str = "cpu", frozen: str = ""
) -> PlainRun:
    """The whole batch on the host with ``embedding_bag`` and a hand-written update.

    ``device``: where the initial weights were drawn.

    ``column_shards``: row-wise Adagrad keeps one moment per row and column shard, which is what
    column-wise sharding does.
    """
    tables = {name: weight.requires_grad_() for name, weight in initial_tables(device).items()}
    moments = {name: torch.zeros(len(weight), column_shards) for name, weight in tables.items()}
    dense = TablesModel(table_configs()).dense
    adamw = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.0)
    all_logits = []
    for step in range(STEPS):
        logits = dense(_plain_vectors(tables, step))[:, 0]
        all_logits.append(logits.detach().clone())
        adamw.zero_grad()
        ((logits - LABELS[step]) ** 2).mean().backward()
        adamw.step()
        for name, weight in tables.items():
            rate = 0.0 if name == frozen else RATES[name]
            _update(weight, moments[name], optimizer, rate)
    weights = {name: weight.detach() for name, weight in tables.items()}
    weights |= {f"dense.{name}": value.detach() for name, value in dense.named_parameters()}
    return PlainRun(torch.stack(all_logits), weights)


def _plain_vectors(tables: dict[str, Tensor], step: int) -> Tensor:
    mode = {"user": "sum", "tags": "mean", "item": "sum", "history": "sum"}
    tables_by_feature = {"user": "user", "tags": "tags", "item": "item", "history": "item"}
    vectors = []
    for feature in FEATURES:
        lists = BATCHES[step][feature]
        offsets = torch.tensor([0, *[len(ids) for ids in lists]]).cumsum(0)[:-1]
        ids = torch.tensor([item for row in lists for item in row])
        weight = tables[tables_by_feature[feature]]
        vectors.append(functional.embedding_bag(ids, weight, offsets, mode=mode[feature]))
    return torch.cat(vectors, dim=1)


@torch.no_grad()
def _update(weight: Tensor, moment: Tensor, optimizer: TableOptimizer, rate: float) -> None:
    gradient = weight.grad
    assert gradient is not None
    weight.grad = None
    if optimizer == "sgd":
        weight -= rate * gradient
        return
    assert optimizer == "rowwise_adagrad"
    shards = moment.shape[1]
    blocks = gradient.view(len(weight), shards, -1)  # [rows, column shards, columns]
    moment += (blocks**2).mean(dim=2)
    weight -= (rate * blocks / (moment.sqrt()[:, :, None] + 1e-8)).reshape(weight.shape)


def local_shards(model: torch.nn.Module) -> dict[str, list[tuple[list[int], Tensor]]]:
    return {
        name.split(".")[-2]: [
            (list(shard.metadata.shard_offsets), shard.tensor.detach().clone())
            for shard in value.local_shards()
        ]
        for name, value in table_weights(model).items()
    }


def full_table(shards: list[tuple[list[int], Tensor]]) -> Tensor:
    """Shards laid out at their offsets, [rows, D]."""
    rows = max(offset[0] + len(shard) for offset, shard in shards)
    columns = max(offset[1] + shard.shape[1] for offset, shard in shards)
    table = torch.full((rows, columns), float("nan"))
    for (row, column), shard in shards:
        table[row : row + shard.shape[0], column : column + shard.shape[1]] = shard
    return table
