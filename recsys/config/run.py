"""The settings of a whole run: its components, and how it trains, checkpoints and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from recsys.config.content import ContentSettings
from recsys.config.embedding import EmbeddingSettings
from recsys.config.limits import NonNegativeFloat, NonNegativeInt, PositiveInt, Seconds
from recsys.config.losses import AuxiliarySettings, ContrastiveSettings
from recsys.config.optimizer import OptimizerSettings
from recsys.config.ranking import RankingSettings, ranking_settings

BestModelBy = Literal["auc", "gauc", "auc_and_gauc"]
LogLevel = Literal["auto", "debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Tracker = str


@dataclass
class MetricSettings:
    """A metric besides those of every evaluation."""

    metric: str
    """precision_at_k, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


@dataclass
class SourceSettings:
    """The rows of training and evaluation."""

    name: str = "parquet"
    """parquet, or a class of your own as `package.module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


@dataclass
class CheckpointSettings:
    """When the state of a run is written, besides the best model: at the end, on SIGTERM, and"""

    every_steps: PositiveInt | None = None
    """Steps from one checkpoint to the next."""
    every_seconds: Seconds | None = 600.0
    """Seconds from one checkpoint to the next."""
    keep: PositiveInt = 2
    """Keep the last so many."""
    asynchronous: Literal["auto", "true", "false"] = "auto"
    """The write overlaps the next steps, at the cost of a copy of tables and optimizer state in
    host memory; auto: where that copy fits."""


@dataclass
class Config:
    """A whole run."""

    content: ContentSettings | Literal["none"] = "none"
    """The content branch: its settings, or none."""
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    ranking: RankingSettings = field(default_factory=ranking_settings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    auxiliary: dict[str, AuxiliarySettings] = field(default_factory=dict)
    """Further losses, by a name of yours."""
    metrics: dict[str, MetricSettings] = field(default_factory=dict)
    """Further metrics, by a name of yours."""
    source: SourceSettings = field(default_factory=SourceSettings)
    batch_size: PositiveInt = 256
    """Impressions per rank and step."""
    accumulate_steps: PositiveInt = 1
    """Dense parameters are updated every so many steps, with the mean gradient of those steps; ID
    tables in each of them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the dense parts (autocast)."""
    tf32: bool = False
    """Matrix products of float32 in TF32, on GPUs that have it."""
    compile: bool = False
    """torch.compile of the dense parts; needs a C++ compiler on CPU."""
    epochs: PositiveInt = 10
    """Passes over the training rows, at most; early stopping ends sooner."""
    validations_per_epoch: PositiveInt = 1
    """Validations in each epoch."""
    best_model_by: BestModelBy = "auc"
    """The metric of all validations that chooses the best model; auc_and_gauc is the mean of
    both."""
    patience: PositiveInt = 2
    """Validations without a better model before training ends."""
    seed: int = 0
    """Seed of weights, dropout and negatives."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: end the run, or be left out, counted and reported."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    num_workers: NonNegativeInt = 1
    """Threads per rank that build batches ahead of the training, beside one that reads ahead; 0:
    the training itself reads and builds each batch when it needs it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; auto: a GPU each where there are any."""
    cache: str | None = None
    """Folder of encoded items; default: ~/.cache/recsys."""
    log_every_steps: PositiveInt = 20
    """Steps from one report of the loss to the next."""
    tracker: list[Tracker] | Tracker = field(default_factory=lambda: ["tensorboard"])
    """What records the metrics: one or several of tensorboard, mlflow, wandb and classes of your
    own as `package.module:Class`."""
    log_level: LogLevel = "auto"
    """Lowest level of log messages; auto: info on rank 0, warning on the others."""
    log_format: LogFormat = "text"
    """Plain lines, or one JSON object per line."""
    profile_steps: NonNegativeInt = 0
    """Measure so many early steps part by part, into RUN/profile.json."""
    stall_timeout: NonNegativeFloat = 300.0
    """A rank that does not go on for so many seconds is named and ends the job; 0: never."""

    def __post_init__(self) -> None:
        if isinstance(self.tracker, str):
            self.tracker = [self.tracker]


CONFIG_NAMES = tuple(Config.__dataclass_fields__)


def content_settings(config: Config) -> ContentSettings | None:
    """Return the settings of the content branch, None for the ID-only twin."""
    return config.content if isinstance(config.content, ContentSettings) else None
