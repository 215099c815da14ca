"""Embedding tables from configuration, on the meta device by default.

Initial weights depend only on the seed, the table and the row, never on the sharding plan.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.types import DataType

Pooling = Literal["none", "sum", "mean"]
Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
TableOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd"]
Kernel = Literal["fused", "uvm", "uvm_caching"]
TablePrecision = Literal["fp32", "fp16"]

# Rows per draw of the initial weights. A shard that starts inside a block draws the whole block.
INITIALIZATION_BLOCK_ROWS = 16384
CACHE_LOAD_FACTOR = 0.2  # TorchRec's


@dataclass
class TableConfig:
    """One embedding table; fields out of range, or that contradict each other, are a ValueError.

    Weight decay acts on the rows in the batch: L2 (``rowwise_adagrad``) or decoupled (``adam``).
    Each column shard has its own ``rowwise_adagrad`` moments, so its updates differ from unsharded.

    Example::

        from embeddings import TableConfig, build_embedding_collection

        item = TableConfig("item", 1000, 16, ["item_id", "history"], learning_rate=0.02)
        collection = build_embedding_collection([item], device="cpu")
    """

    name: str  # unique over all collections of a model
    num_embeddings: int  # rows; ids run from 0 to num_embeddings - 1
    embedding_dim: int
    features: list[str]  # features that look up in this table; sharing a table is free
    pooling: Pooling = "none"  # none: one vector per id; sum, mean: one vector per list of ids
    sharding: Sharding = "auto"  # auto: the planner chooses; with one rank, whole tables
    optimizer: TableOptimizer = "rowwise_adagrad"  # adam runs on CUDA only
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    eps: float = 1e-8  # added to the root of the second moment
    init_std: float = 0.01  # standard deviation of the normal initial weights
    frozen: bool = False  # never updated, no optimizer state; training settings are ignored
    # Where rows are stored: on the device, on the host (CUDA), or on the host with a device cache.
    kernel: Kernel = "fused"
    cache_load_factor: float = CACHE_LOAD_FACTOR  # share of the rows in the cache of uvm_caching
    # Mean ids per row of a feature, for the planner's estimate of the load; default 1.
    ids_per_row: dict[str, float] = field(default_factory=dict)
    # Type of the rows. FBGEMM rounds updates of fp16 stochastically on GPUs, to the nearest on CPU.
    precision: TablePrecision = "fp32"

    def __post_init__(self) -> None:
        for problem in chain(self._name_problems(), self._number_problems()):
            raise ValueError(f"table '{self.name}': {problem}")

    @property
    def megabytes(self) -> float:
        return self.num_embeddings * self.embedding_dim * self.bytes_of_weight / 2**20

    @property
    def bytes_of_weight(self) -> int:
        return 2 if self.precision == "fp16" else 4

    def _name_problems(self) -> Iterator[str]:
        if not self.name or "." in self.name:
            yield (
                "a table's name must not be empty or contain a dot, since it is part of a "
                "parameter's name; rename the table"
            )
        if hasattr(nn.ModuleDict(), self.name):
            # The collections keep their tables in a ModuleDict, with the names as attributes.
            yield (
                "this name is an attribute of torch.nn.ModuleDict; rename the table, for instance "
                f"to '{self.name}_table'"
            )
        if not self.features:
            yield "no features; list at least one"
        for name in self.features:
            if self.features.count(name) > 1:
                yield f"feature '{name}' is listed twice; list it once"
        for config_field in fields(self):
            value, allowed = getattr(self, config_field.name), get_args(config_field.type)
            if get_origin(config_field.type) is Literal and value not in allowed:
                yield f"{config_field.name} is {value!r}; choose one of {', '.join(allowed)}"

    def _number_problems(self) -> Iterator[str]:
        for field_name in ("num_embeddings", "embedding_dim"):
            value = getattr(self, field_name)
            if not isinstance(value, int) or value < 1:
                yield f"{field_name} is {value!r}; set an integer of at least 1"
        for field_name in ("learning_rate", "weight_decay", "eps", "init_std"):
            value = getattr(self, field_name)
            if not 0.0 <= value < float("inf"):
                yield f"{field_name} is {value!r}; set a finite number of at least 0"
        if not 0.0 < (share := self.cache_load_factor) <= 1.0:
            yield f"cache_load_factor is {share!r}; set (0, 1]"
        if self.embedding_dim % 4 != 0:
            yield (
                f"embedding_dim is {self.embedding_dim}, and FBGEMM's kernels take multiples of 4; "
                "round it up (embedding.dim, or embedding_dim of the table)"
            )
        if self.weight_decay > 0 and self.optimizer in ("sgd", "adagrad"):
            yield (
                f"weight_decay {self.weight_decay} with optimizer '{self.optimizer}', whose fused "
                "kernel has none; set weight_decay to 0 or optimizer to 'rowwise_adagrad'"
            )


class NormalInitializer:
    """Writes a table's initial weights, or any rectangle of them, from the seed alone.

    Each block of rows has its own generator, so shards get the same numbers as an unsharded table.
    """

    def __init__(self, table: TableConfig) -> None:
        self.name = table.name
        self.shape = (table.num_embeddings, table.embedding_dim)
        self.std = table.init_std

    def __call__(self, weight: Tensor) -> None:
        """Fill a whole table, ``weight`` [num_embeddings, D]; TorchRec's ``init_fn``."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"table '{self.name}': asked to initialise a shard of shape "
                f"{tuple(weight.shape)} as if it were the table {self.shape}; shard with "
                "embeddings.sharders()"
            )
        self.fill(weight)

    @torch.no_grad()
    def fill(self, weight: Tensor, row_offset: int = 0, column_offset: int = 0) -> None:
        """Fill the shard ``weight`` [rows, columns] that starts at the offsets in the table."""
        if weight.is_meta:
            return
        num_embeddings, dim = self.shape
        rows, columns = weight.shape
        generator = torch.Generator(device=weight.device)
        first_block = row_offset // INITIALIZATION_BLOCK_ROWS * INITIALIZATION_BLOCK_ROWS
        for start in range(first_block, row_offset + rows, INITIALIZATION_BLOCK_ROWS):
            end = min(start + INITIALIZATION_BLOCK_ROWS, num_embeddings)
            generator.manual_seed(self._block_seed(start))
            block = torch.empty(end - start, dim, device=weight.device)
            block.normal_(0.0, self.std, generator=generator)
            top, bottom = max(start, row_offset), min(end, row_offset + rows)
            weight[top - row_offset : bottom - row_offset] = block[
                top - start : bottom - start, column_offset : column_offset + columns
            ]

    def _block_seed(self, start: int) -> int:
        text = f"{torch.initial_seed()}/{self.name}/{start}"
        # 63 bits: torch refuses seeds beyond a signed 64-bit integer.
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def check_tables(tables: Sequence[TableConfig]) -> None:
    """Raise a ValueError for repeated names or features, or unpooled tables of two dimensions."""
    table_of_feature: dict[str, str] = {}
    names = [table.name for table in tables]
    unpooled = [table for table in tables if table.pooling == "none"]
    for table in tables:
        if names.count(table.name) > 1:
            raise ValueError(
                f"table '{table.name}' is configured twice; table names must be unique over all "
                "collections, so rename one"
            )
        for feature in table.features:
            if feature in table_of_feature:
                raise ValueError(
                    f"feature '{feature}' is on tables '{table_of_feature[feature]}' and "
                    f"'{table.name}'; leave it on one table, or add a second feature to the data"
                )
            table_of_feature[feature] = table.name
    for table in unpooled:
        if table.embedding_dim != unpooled[0].embedding_dim:
            raise ValueError(
                f"table '{table.name}' has embedding_dim {table.embedding_dim} and table "
                f"'{unpooled[0].name}' {unpooled[0].embedding_dim}; tables with pooling 'none' "
                "share one collection; set one embedding_dim for all of them"
            )


def build_embedding_bag_collection(
    tables: Sequence[TableConfig], device: torch.device | str = "meta"
) -> EmbeddingBagCollection | None:
    """Build the collection of tables with pooling ``sum`` or ``mean``; None without any.

    Example::

        from embeddings import TableConfig, build_embedding_bag_collection

        genres = TableConfig("genres", 20, 8, ["genres"], pooling="sum")
        bags = build_embedding_bag_collection([genres], "cpu")  # KeyedJaggedTensor -> KeyedTensor
    """
    check_tables(tables)
    configs = [
        EmbeddingBagConfig(**_shape(table), pooling=PoolingType[table.pooling.upper()])
        for table in tables
        if table.pooling != "none"
    ]
    if not configs:
        return None
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


def build_embedding_collection(
    tables: Sequence[TableConfig], device: torch.device | str = "meta"
) -> EmbeddingCollection | None:
    """Build the collection of tables with pooling ``none``; None without any.

    Example::

        import torch
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        from embeddings import TableConfig, build_embedding_collection

        items = build_embedding_collection([TableConfig("item", 100, 4, ["item"])], "cpu")
        values, lengths = torch.tensor([7, 9]), torch.tensor([1, 1])
        ids = KeyedJaggedTensor.from_lengths_sync(["item"], values, lengths)
        items(ids)["item"].values().shape  # [2, 4]
    """
    check_tables(tables)
    configs = [EmbeddingConfig(**_shape(table)) for table in tables if table.pooling == "none"]
    if not configs:
        return None
    return EmbeddingCollection(tables=configs, device=torch.device(device))


def _shape(table: TableConfig) -> dict[str, Any]:
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "feature_names": list(table.features),
        "data_type": DataType(table.precision.upper()),
        "init_fn": NormalInitializer(table),
    }
