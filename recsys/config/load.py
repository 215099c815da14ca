"""The configuration of a run: one tree of dataclasses, read from YAML and the command line.

Every field is a setting users may write in a recipe (`recsys/recipes/*.yaml`) or override as
`--any.setting VALUE`. jsonargparse checks names and types; `recsys.config.checks` what only shows
when the parts are seen together (dimensions that do not divide, modes that need each other).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from recsys.config.checks import validate
from recsys.config.content import (
    ContentSettings,
    FusionSettings,
    HistorySettings,
    LoraSettings,
    ModalitySettings,
    SamplingSettings,
)
from recsys.config.plain_yaml import load_plain_yaml

BestModelBy = Literal["auc", "gauc", "auc_and_gauc"]
LogLevel = Literal["auto", "debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Tracker = str  # tensorboard, mlflow, wandb, or a class of your own as `package.module:Class`


@dataclass
class InitFromSettings:
    """Pretrained vectors of a table, in Parquet: one row per id with a list of floats."""

    path: str  # file, folder or URL
    id_column: str | None = None  # default: `id`, or `row` as `export-tables` writes it
    vector_column: str = "vector"
    table: str | None = None  # its name in an export of several tables; default: the same


@dataclass
class TableSettings:
    """Settings of one ID table that differ from `EmbeddingSettings`; None keeps the default."""

    embedding_dim: int | None = None  # pooled tables only; sequence tables share embedding.dim
    sharding: Literal["auto", "row_wise", "table_wise", "column_wise"] | None = None
    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    # Pooled tables: in training so many of the rows of a batch are without the vector, so that the
    # model learns to do without, as it must for new ids.
    id_dropout: float = 0.0
    frozen: bool = False  # keeps its first weights, those of `init_from` for instance
    init_from: InitFromSettings | None = None


@dataclass
class CommunicationSettings:
    """Types in which looked-up vectors travel between ranks, and their gradients back."""

    forward: Literal["fp32", "fp16", "bf16"] = "fp32"
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"


@dataclass
class EmbeddingSettings:
    """The ID tables. One table per `id` or `ids` column of the schema."""

    dim: int = 32
    sharding: Literal["auto", "row_wise", "table_wise", "column_wise"] = "auto"
    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    init_std: float = 0.01
    tables: dict[str, TableSettings] = field(default_factory=dict)  # by column name
    skip: list[str] = field(default_factory=list)  # id columns of the schema that get no table
    # Look each item of the histories up once per batch and rank, however often it occurs.
    index_dedup: bool = True
    communication: CommunicationSettings = field(default_factory=CommunicationSettings)


@dataclass
class ContrastiveSettings:
    """Content-ID-Contrastive loss."""

    weight: float = 0.0
    variant: Literal["in_batch", "published"] = "in_batch"
    dim: int = 32
    temperature: float = 0.1
    learn_temperature: bool = False
    normalize: bool = True
    num_negatives: int = 16  # published variant
    stop_gradient: Literal["none", "content", "id"] = "none"
    all_ranks: bool = False  # in_batch: negatives from every rank


@dataclass
class RankingSettings:
    """The ranking backbone over ID and content vectors."""

    # One of recsys.ranking.RANKING_MODELS, or a class of your own as `package.module:Class`.
    name: str = "din_dcn"
    options: dict[str, Any] = field(default_factory=dict)  # of a class of your own
    attention_units: list[int] = field(default_factory=lambda: [64, 16])  # din, din_dcn, mmoe
    cross_layers: int = 2  # din_dcn, dlrm_dcn
    cross_rank: int = 32
    dense_units: list[int] = field(default_factory=lambda: [64])  # dlrm, dlrm_dcn, deepfm
    mlp_units: list[int] = field(default_factory=lambda: [128, 64])
    dropout: float = 0.3
    # din, din_dcn, sim: so many MLPs in one (TabM), whose mean logit ranks; 1 is one MLP.
    ensemble_members: int = 1
    # din, din_dcn, sim, mmoe: dense features, what the history's lists say and similarities get
    # mean 0 and variance 1 over the rows trained on so far.
    standardize_numbers: bool = False
    label_weights: dict[str, float] = field(default_factory=dict)  # several labels; default 1
    num_experts: int = 4  # mmoe
    # sim: what of a long history is attended to, by similarity (of content; of ID vectors where
    # there is none) or by equal category.
    search: Literal["similarity", "category"] = "similarity"
    search_top_k: int = 50  # at most so many items of each history
    search_heads: int = 2  # of the attention to them
    category: str | None = None  # the item column of kind category
    time_gaps: str | None = None  # the parallel list with each item's age; default: its place
    # two_tower: columns besides the group's that tell of the user, not of the item.
    query_features: list[str] = field(default_factory=list)
    tower_dim: int = 32
    temperature: float = 0.1
    loss: Literal["pointwise", "in_batch_softmax", "sampled_softmax"] = "pointwise"
    num_negatives: int = 256  # sampled_softmax: per rank and step
    # log_uniform: the n-th most frequent item of the training rows with about 1 / n.
    negative_sampling: Literal["uniform", "log_uniform"] = "uniform"
    # Softmax losses: false leaves popularity out of the scores; rare and new items are then found.
    log_q_correction: bool = True
    all_ranks: bool = False  # softmax losses: negatives from every rank


@dataclass
class OptimizerSettings:
    """The optimizer of the dense parts; the ID tables have their own in `embedding`."""

    # adamw, adam, sgd, adafactor, or a class of your own as `package.module:Class`.
    name: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of that class
    learning_rate: float = 1e-3
    content_learning_rate: float = 1e-3  # projections, fusion, history maps, contrastive heads
    encoder_learning_rate: float = 1e-4  # what trains inside the encoders
    weight_decay: float = 0.01
    warmup_steps: int = 20
    # What the learning rates do after warm-up: constant, cosine, linear, or a function of your own
    # as `package.module:function`.
    schedule: str = "constant"
    schedule_options: dict[str, Any] = field(default_factory=dict)  # of a function of your own
    decay_steps: int | None = None  # steps after warm-up until the decay ends; default: all epochs
    clip_norm: float | None = None  # largest norm of the gradient of all dense parameters
    # Evaluate and keep the exponential moving average of the dense weights with this decay.
    ema_decay: float | None = None


@dataclass
class AuxiliarySettings:
    """A loss besides those of ranking and contrast."""

    loss: str  # distillation, or a class of your own as `package.module:Class`
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class MetricSettings:
    """A metric besides those of every evaluation."""

    metric: str  # precision_at_k, or a class of your own as `package.module:Class`
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SourceSettings:
    """Where the rows of training and evaluation come from."""

    name: str = "parquet"  # or a class of your own as `package.module:Class`
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class CheckpointSettings:
    """When the state of a run is written, besides the best model: at the end, on SIGTERM, and"""

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    keep: int = 2  # the last so many
    # The write overlaps the next steps, at the cost of a copy of tables and optimizer state in
    # host memory; auto: where that copy fits.
    asynchronous: Literal["auto", "true", "false"] = "auto"


@dataclass
class Config:
    """A whole run."""

    content: ContentSettings | Literal["none"] = "none"
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    auxiliary: dict[str, AuxiliarySettings] = field(default_factory=dict)  # losses, by your name
    metrics: dict[str, MetricSettings] = field(default_factory=dict)  # by your name
    source: SourceSettings = field(default_factory=SourceSettings)
    batch_size: int = 256  # impressions per rank and step
    # Dense parameters are updated every so many steps, with the mean gradient of those steps; ID
    # tables in each of them.
    accumulate_steps: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"  # of the dense parts (autocast)
    tf32: bool = False  # matrix products of float32 in TF32, on GPUs that have it
    compile: bool = False  # torch.compile of the dense parts; needs a C++ compiler on CPU
    epochs: int = 10  # at most; early stopping ends sooner
    validations_per_epoch: int = 1
    # What chooses the best model of all validations; `auc_and_gauc` is the mean of both.
    best_model_by: BestModelBy = "auc"
    patience: int = 2  # validations without a better model before training ends
    seed: int = 0
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave it out, counted and told
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    # Threads per rank that build batches ahead of the training, beside one that reads ahead; 0: the
    # training itself reads and builds each batch when it needs it.
    num_workers: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: str | None = None  # folder of encoded items; default ~/.cache/recsys
    log_every_steps: int = 20
    # What records the metrics; a list in a recipe, one word on the command line.
    tracker: list[Tracker] | Tracker = field(default_factory=lambda: ["tensorboard"])
    log_level: LogLevel = "auto"  # auto: info on rank 0, warning on the others
    log_format: LogFormat = "text"  # json: one JSON object per line
    profile_steps: int = 0  # so many early steps are measured part by part: RUN/profile.json
    # A rank that does not go on for so many seconds is named and ends the job; 0: never.
    stall_timeout: float = 300.0

    def __post_init__(self) -> None:
        if isinstance(self.tracker, str):
            self.tracker = [self.tracker]


__all__ = [
    "AuxiliarySettings",
    "CheckpointSettings",
    "CommunicationSettings",
    "Config",
    "ContentSettings",
    "ContrastiveSettings",
    "EmbeddingSettings",
    "FusionSettings",
    "HistorySettings",
    "InitFromSettings",
    "LoraSettings",
    "MetricSettings",
    "ModalitySettings",
    "OptimizerSettings",
    "RankingSettings",
    "SamplingSettings",
    "SourceSettings",
    "TableSettings",
]

CONFIG_NAMES = tuple(Config.__dataclass_fields__)


def add_config_arguments(parser: ArgumentParser, skip: frozenset[str] = frozenset()) -> None:
    """Adds `--config FILE` and every setting of `Config` as `--name.of.setting`.

    Args:
        parser: of a command.
        skip: settings that the command adds by itself.
    """
    parser.add_argument("--config", action="config", help="a recipe (YAML)")
    parser.add_class_arguments(Config, None, skip=set(skip))


def config_from(namespace: Namespace) -> Config:
    """The checked `Config` in parsed command-line arguments."""
    config = Config(**{name: namespace[name] for name in CONFIG_NAMES})
    validate(config)
    return config


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_config_arguments(parser)
    return parser


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Reads a recipe; `overrides` are command-line words such as `["--epochs", "1"]`.

    Raises:
        ValueError: a missing file, an unknown key or a wrong type, named.

    Example::

        config = load_config("recsys/recipes/tiny.yaml", ["--content", "none"])
    """
    if not Path(path).is_file():
        raise ValueError(f"config {path}: no such file")
    parser = _parser()
    try:
        load_plain_yaml(Path(path).read_bytes())  # a run's configuration may be someone else's
        namespace = parser.parse_args(["--config", str(path), *(overrides or [])])
    except Exception as error:
        raise ValueError(f"config {path}: {error}") from error
    return config_from(parser.instantiate(namespace))


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration, readable by `load_config`."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))


def to_plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def content_settings(config: Config) -> ContentSettings | None:
    """The settings of the content branch, None for the ID-only twin."""
    return config.content if isinstance(config.content, ContentSettings) else None
