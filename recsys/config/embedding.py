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
    """Division of the table over the ranks."""
    optimizer: TableOptimizer | None = None
    """Optimizer of the table."""
    learning_rate: NonNegativeFloat | None = None
    """Learning rate of the table."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the table."""
    id_dropout: Dropout = 0.0
    """Share of a training batch's rows whose vector is dropped, so that the model learns to rank
    without it, as it must for new ids; pooled tables, and that of the target item, whose vector in
    histories stays. Up to `neighbours.dropout`, the same rows lack statistics of neighbours."""
    frozen: bool = False
    """Keep the initial weights, such as those of `init_from`."""
    kernel: Kernel = "fused"
    """Memory of the table's rows and their optimizer state. fused: the device's; uvm: the host's,
    read by the GPU at each lookup; uvm_caching: the host's, with a cache of rows on the GPU. uvm
    and uvm_caching need CUDA."""
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
    """Number of copies. Lookups of a rank stay among the ranks of its copy; ranks of a node hold
    the same part of different copies, so it must divide the ranks of a node."""
    sync_every_steps: PositiveInt = 1
    """Steps from one mean over the copies, of weights and optimizer state, to the next."""


@dataclass
class HardwareSettings:
    """Figures that the planner computes with; None: by the GPU's name, else TorchRec's default.

    Bandwidths are in GB a second and one direction.
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
    """Share of memory that the tables leave to dense parts, activations and batches."""


@dataclass
class EmbeddingSettings:
    """ID tables: one per `id` or `ids` column of the schema."""

    dim: Width = 32
    """Width of the vectors."""
    sharding: Sharding = "auto"
    """Division of the tables over ranks; auto: the planner chooses, on one rank whole tables."""
    optimizer: TableOptimizer = "rowwise_adagrad"
    """Optimizer of the tables, applied in the backward pass."""
    learning_rate: NonNegativeFloat = 0.05
    """Learning rate of the tables."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the tables."""
    init_std: NonNegativeFloat = 0.01
    """Standard deviation of the initial weights."""
    precision: TablePrecision = "fp32"
    """Type of the tables' rows; the state of their optimizers stays fp32. fp16 takes half the
    memory and reads half the bytes; on GPUs its updates are rounded up or down by chance, so that
    small ones count on the average, on CPU to the nearest number."""
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
