"""Settings of a whole run: its losses and optimizer, and how it trains, checkpoints and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recsys.config.content import ContentSettings
from recsys.config.embedding import EmbeddingSettings
from recsys.config.limits import (
    Dropout,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Seed,
    Share,
    UnitInterval,
    Width,
)
from recsys.config.ranking import RankingSettings, ranking_settings


@dataclass
class NeighbourSettings:
    """Kernel regression and votes by items of the history that are similar to the target."""

    values: str | None = None
    """List of numbers beside the history, such as stars, that the user gave each item; default:
    every item of the history counts as 1, as in logs of clicks or purchases."""
    dim: Width = 32
    """Width of the item vectors of the kernel: of those from co-occurrence, and from content."""
    taste_dim: Width = 128
    """Width of the item vectors from the users' values, by whose similarity items vote."""
    neighbours_per_item: PositiveInt = 256
    """Most similar items that are kept for each item while its vector is computed."""
    dropout: Dropout = 0.3
    """Share of a training batch's rows whose item counts as new, so that the model learns to rank
    new items by content."""
    time: str | None = "time"
    """Column of the rows with the moment of each. If the training files are in its order, their
    rows read statistics of earlier rows alone; else, and with null, those of other users."""
    partitions: PositiveInt = 30
    """In a continual run, number of previous partitions whose rows count in the statistics, too."""
    significance: NonNegativeFloat = 20.0
    """Similarities are multiplied by n / (n + significance), n the users that items share."""


@dataclass
class ContrastiveSettings:
    """Content-ID-Contrastive loss."""

    weight: NonNegativeFloat = 0.0
    """Weight of the loss; 0 turns it off."""
    variant: Literal["in_batch", "published"] = "in_batch"
    """Negatives: all items of the batch, or `num_negatives` sampled ones as published."""
    dim: Width = 32
    """Width of the space in which content and ID vectors are compared."""
    temperature: float = 0.1
    """Divisor of the cosines."""
    normalize: bool = True
    """Compare directions (cosine) rather than vectors (dot product)."""
    num_negatives: PositiveInt = 16
    """Sampled negatives of the published variant."""
    all_ranks: bool = False
    """Take the negatives of in_batch from every rank."""


@dataclass
class AuxiliarySettings:
    """A loss besides the ranking and contrastive losses."""

    loss: str
    """distillation, or a class of your own as `package.module:Class`."""
    weight: NonNegativeFloat = 1.0
    """Weight of the loss."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


@dataclass
class OptimizerSettings:
    """Optimizer of the dense parts; the ID tables have their own in `embedding`."""

    name: str = "adamw"
    """adamw, adam, sgd, adafactor, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that class."""
    learning_rate: NonNegativeFloat = 1e-3
    """Learning rate of parameters without one of the rates below."""
    content_learning_rate: NonNegativeFloat = 1e-3
    """Learning rate of projections, fusion, history maps and contrastive heads."""
    encoder_learning_rate: NonNegativeFloat = 1e-4
    """Learning rate of trained parameters inside the encoders."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of weights; biases and normalisation layers have none."""
    warmup_steps: NonNegativeInt = 20
    """Steps in which the learning rates rise from 0."""
    schedule: str = "constant"
    """Course of the learning rates after warm-up: constant, cosine, linear, or a function of your
    own as `package.module:function`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, such as `final_share`."""
    decay_steps: PositiveInt | None = None
    """Steps after warm-up until a decay ends; default: all epochs."""
    clip_norm: PositiveFloat | None = None
    """Gradient clipping: largest norm of the gradient of all dense parameters together."""
    ema_decay: UnitInterval | None = None
    """Evaluate and keep the exponential moving average of the dense weights with this decay, which
    it reaches after some steps."""
    ema_tables: bool = False
    """Average the ID tables, too: their memory once more, and a pass over all rows in each step."""


BestModelBy = Literal[
    "auc", "gauc", "auc_and_gauc", "all_and_unseen", "recall", "ndcg", "rmse", "mae"
]
LogLevel = Literal["auto", "debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Resume = Literal["auto", "never", "must"]
Tracker = str


@dataclass
class MetricSettings:
    """A metric in addition to those of every evaluation."""

    metric: str
    """precision_at_k, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


@dataclass
class SourceSettings:
    """Source of the rows for training and evaluation."""

    name: str = "parquet"
    """parquet, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


@dataclass
class CheckpointSettings:
    """Checkpoints of a run's state, besides those of the best model, at the end and on SIGTERM."""

    every_steps: PositiveInt | None = None
    """Steps from one checkpoint to the next."""
    every_seconds: Seconds | None = 600.0
    """Seconds from one checkpoint to the next."""
    keep: PositiveInt = 2
    """Number of latest checkpoints that are kept."""
    asynchronous: Literal["auto", "true", "false"] = "auto"
    """Finish writing during the next steps: true copies tables and optimizer state in host memory
    first; auto: only from a GPU, if that fits, else steps wait until the files are written, not
    until the disk has them."""


@dataclass
class ContinualSettings:
    """Training on one partition after another (`recsys continual`); other commands ignore it."""

    passes: PositiveInt = 1
    """Passes over the rows of a partition, in place of `epochs`."""
    first_passes: list[PositiveInt] = field(default_factory=list)
    """Passes over the first partitions of a run without --warm-start, a number for each, as its
    model has seen few rows; `passes` after them: [4, 2] is 4 over the first and 2 over the second.
    """
    order: Literal["shuffled", "time"] = "shuffled"
    """Order of a partition's rows. shuffled: by the seed; time: the order of its files, which must
    be sorted by time; each rank reads a contiguous range of rows."""
    late: Literal["refuse", "train"] = "refuse"
    """A partition older than one that is trained on, which has arrived since: refuse it by name, or
    train on it next. It has no scores, since the model knows days after it."""
    keep: PositiveInt = 2
    """Number of latest partitions whose models and checkpoints are kept."""
    quiet_seconds: Seconds | None = None
    """With --follow: a partition without _SUCCESS is complete if none of its files has changed for
    this many seconds; default: only _SUCCESS counts."""
    poll_seconds: PositiveFloat = 10.0
    """With --follow: seconds between two checks for a new partition."""
    packages: str | None = None
    """Folder that gets a package of each partition's model and, from the second on, a delta from
    the one before (NAME and NAME.delta); the last `keep` packages and all deltas are kept."""
    package_tables: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """Type of the ID tables in packages."""
    edited_items: Share = 0.5
    """Largest share of the known items whose content may change from one partition to the next;
    above it ids are taken to have changed their meaning, which is an error."""


@dataclass
class Config:
    """Settings of a whole run."""

    content: ContentSettings | Literal["none"] = "none"
    """The content branch: its settings, or none."""
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    ranking: RankingSettings = field(default_factory=ranking_settings)
    neighbours: NeighbourSettings | None = None
    """Statistics of items that are similar to those of the history; default: none."""
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    auxiliary: dict[str, AuxiliarySettings] = field(default_factory=dict)
    """Further losses, by names that you choose."""
    metrics: dict[str, MetricSettings] = field(default_factory=dict)
    """Further metrics, by names that you choose."""
    source: SourceSettings = field(default_factory=SourceSettings)
    batch_size: PositiveInt = 256
    """Impressions per rank and step."""
    accumulate_steps: PositiveInt = 1
    """Steps per update of the dense parameters, which uses the mean gradient of those steps; ID
    tables are updated in each step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the dense parts (autocast)."""
    tf32: bool | Literal["auto"] = "auto"
    """Compute float32 matrix products in TF32, on GPUs that support it; auto: there, not on CPU."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the dense parts with torch.compile. auto: on GPUs, where a step launches hundreds of
    kernels without it, if torch.compile works; true: or an error. On CPU it needs a C++ compiler.
    """
    kernels: Literal["auto", "torch", "native"] = "auto"
    """Target attention and dot products of DLRM by kernels of this package. auto: on CPU where a
    C++ compiler is, once per machine, else by PyTorch; torch: by PyTorch; native: by kernels, or an
    error. On CUDA PyTorch computes."""
    epochs: PositiveInt = 10
    """Largest number of passes over the training rows; early stopping may end sooner."""
    validations_per_epoch: PositiveInt = 1
    """Validations in each epoch."""
    best_model_by: BestModelBy = "auc"
    """Validation metric that chooses the best model. auc_and_gauc: the mean of both, or AUC where
    no user has rows of both labels; all_and_unseen: the mean of these two and of those of rows of
    unseen items, as far as they are defined; recall, ndcg: recall@10 and ndcg@10 of retrieval
    models, by a search of all items; rmse, mae: if the first label is a number, and the lowest is
    best."""
    patience: PositiveInt = 2
    """Validations without a better model before training ends."""
    patience_share: NonNegativeFloat = 0.0
    """Training also ends after this many steps without a better model, as a share of the best
    model's step: with 0.2 a run takes about 1.2 times the steps to its best model."""
    seed: Seed = 0
    """Seed of weights, dropout and negatives."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error: the first unusable row ends the run; skip: such rows are left out, counted and
    reported."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    continual: ContinualSettings = field(default_factory=ContinualSettings)
    num_workers: NonNegativeInt | Literal["auto"] = "auto"
    """Threads per rank that build batches ahead of the training, beside one that reads ahead; 0:
    the training thread reads and builds each batch on demand; auto: 1, and up to 4 beside a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; auto: one GPU per rank if the machine has GPUs."""
    cache: str | None = None
    """Folder of encoded items; default: ~/.cache/recsys."""
    log_every_steps: PositiveInt = 20
    """Steps from one log of the loss to the next."""
    tracker: list[Tracker] | Tracker = field(default_factory=lambda: ["tensorboard"])
    """Recorders of the metrics: one or several of tensorboard, mlflow, wandb and classes of your
    own as `package.module:Class`."""
    callbacks: list[str] = field(default_factory=list)
    """Classes of your own as `package.module:Class`, which training calls at its begin, steps,
    validations and end."""
    log_level: LogLevel = "auto"
    """Lowest level of log messages; auto: info on rank 0, warning on the others."""
    log_format: LogFormat = "text"
    """Plain lines, or one JSON object per line."""
    profile_steps: NonNegativeInt = 0
    """Number of early steps to profile; the trace is RUN/profile_trace.json.gz."""
    stall_timeout: NonNegativeFloat = 300.0
    """Seconds without progress after which the job ends and names the rank; 0: never."""

    def __post_init__(self) -> None:
        if isinstance(self.tracker, str):
            self.tracker = [self.tracker]


CONFIG_NAMES = tuple(Config.__dataclass_fields__)


def content_settings(content: ContentSettings | Literal["none"]) -> ContentSettings | None:
    """Return the settings of the content branch, None for the ID-only baseline."""
    return content if isinstance(content, ContentSettings) else None
