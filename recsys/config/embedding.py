"""Settings of the ID tables, `embedding` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recsys.config.limits import (
    Dropout,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Width,
)

Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
TableOptimizer = Literal["rowwise_adagrad", "adagrad", "adam", "sgd"]
NewRows = Literal["random", "zero", "mean"]
Kernel = Literal["fused", "uvm", "uvm_caching"]
TablePrecision = Literal["fp32", "fp16"]
WireType = Literal["fp32", "fp16", "bf16"]


@dataclass
class InitFromSettings:
    """Pretrained vectors of a table, in Parquet: one row per id with a list of floats."""

    path: str
    """File, folder or URL."""
    id_column: str | None = None
    """Column of the ids; default: `id`, or `row` as `export-tables` writes it."""
    vector_column: str = "vector"
    """Column of the vectors."""
    table: str | None = None
    """The table's name in an export of several tables; default: the same name."""


@dataclass
class TableSettings:
    """Settings of one ID table that differ from `EmbeddingSettings`; None keeps the default."""

    embedding_dim: Width | None = None
    """Width of the vectors; pooled tables only, as sequence tables share `embedding.dim`."""
    sharding: Sharding | None = None
    """How the table is sharded over the ranks."""
    optimizer: TableOptimizer | None = None
    """Optimizer of the table."""
    learning_rate: NonNegativeFloat | None = None
    """Learning rate of the table."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the table."""
    id_dropout: Dropout = 0.0
    """Share of a training batch's rows whose vector is replaced by zeros, so that the model learns
    to rank new ids. For pooled tables, and for that of the target item, whose vectors in histories
    stay; as far as both shares allow, `neighbours.dropout` takes the same rows."""
    frozen: bool = False
    """Keep the initial weights, such as those of `init_from`."""
    kernel: Kernel = "fused"
    """Where the table's rows and optimizer state are stored. fused: device memory; uvm: host memory
    that the GPU reads at each lookup; uvm_caching: host memory, with a cache of rows on the GPU.
    uvm and uvm_caching need CUDA."""
    precision: TablePrecision | None = None
    """Type of the table's rows."""
    cache_load_factor: PositiveShare | None = None
    """Share of the rows that fit into the cache of kernel uvm_caching; default: 0.2."""
    init_from: InitFromSettings | None = None
    """Pretrained initial vectors."""
    new_rows: NewRows = "random"
    """Values of rows that no training step has updated, at a warm start and in every validation.
    random: their initial weights; zero: zeros, as `id_dropout` has them in training; mean: the mean
    of the trained rows."""


@dataclass
class CommunicationSettings:
    """Types in which ranks send looked-up vectors to each other, and gradients back."""

    forward: WireType = "fp32"
    """Type of the vectors."""
    backward: WireType = "fp32"
    """Type of their gradients."""


@dataclass
class ParallelSettings:
    """Several copies of the tables, each on some of the ranks (2D parallelism); needs CUDA."""

    copies: PositiveInt = 1
    """Number of copies. A rank looks up ids only on the ranks of its copy. Ranks of a node hold the
    same shards of different copies, so the number must divide the ranks of a node."""
    sync_every_steps: PositiveInt = 1
    """Steps between two averages of the copies' weights and optimizer state."""


@dataclass
class HardwareSettings:
    """Hardware figures for the planner; None: those known by the GPU's name, or TorchRec's default.

    Bandwidths are one-directional, in GB/s.
    """

    memory_gb_per_s: PositiveFloat | None = None
    """Bandwidth of a GPU's memory."""
    host_link_gb_per_s: PositiveFloat | None = None
    """Bandwidth between a GPU and its host's memory."""
    intra_node_gb_per_s: PositiveFloat | None = None
    """Bandwidth between GPUs of a node."""
    inter_node_gb_per_s: PositiveFloat | None = None
    """Bandwidth between nodes, per GPU."""
    reserved_share: Dropout = 0.15
    """Share of memory reserved for dense parts, activations and batches."""


@dataclass
class EmbeddingSettings:
    """ID tables: one per `id` or `ids` column of the schema."""

    dim: Width = 32
    """Width of the vectors."""
    sharding: Sharding = "auto"
    """How tables are sharded over ranks; auto: the planner chooses; with one rank, whole tables."""
    optimizer: TableOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, applied in the backward pass."""
    learning_rate: NonNegativeFloat = 0.05
    """Learning rate of the tables."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the tables."""
    init_std: NonNegativeFloat = 0.01
    """Standard deviation of the initial weights."""
    precision: TablePrecision = "fp32"
    """Type of the tables' rows; optimizer state stays fp32. fp16 takes half the memory and reads
    half the bytes. GPUs round its updates stochastically, so that small updates count on average;
    CPUs round them to the nearest number."""
    tables: dict[str, TableSettings] = field(default_factory=dict)
    """Settings of single tables, by column name."""
    skip: list[str] = field(default_factory=list)
    """Id columns of the schema that get no table."""
    communication: CommunicationSettings = field(default_factory=CommunicationSettings)
    prefetch: bool = False
    """Fetch the rows of the next batch into the caches of uvm_caching tables while the current one
    is computed; needs CUDA."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
