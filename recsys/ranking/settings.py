"""Settings of the ranking models and of their layers, which need no import of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recsys.config.limits import (
    Dropout,
    NonNegativeInt,
    NumLayers,
    PositiveFloat,
    PositiveInt,
    Width,
)
from recsys.config.ranking import RankingSettings, RetrievalLossName, RetrievalSettings

GapScale = Literal["linear", "log_days"]


@dataclass
class HeadSettings(RankingSettings):
    """Settings of `ranking_head`."""

    ensemble_members: PositiveInt = 1
    """Number of MLPs in one ensemble (TabM), whose mean logit ranks; 1 is a single MLP."""


@dataclass
class CrossSettings(RankingSettings):
    """Settings of a low-rank cross network (DCN-v2)."""

    cross_layers: NumLayers = 2
    """Layers of the cross network."""
    cross_rank: Width = 32
    """Rank of the weights of the cross layers."""


@dataclass
class DenseSettings(RankingSettings):
    """Settings of models that map the dense features to a vector."""

    dense_units: list[Width] = field(default_factory=lambda: [64])
    """Units of the hidden layers of the MLP over the dense features."""


@dataclass
class NumbersSettings(RankingSettings):
    """Settings of `RowFeatures`."""

    standardize_numbers: bool = False
    """Standardise dense features, numbers of the history's lists and similarities to mean 0 and
    variance 1 over the rows trained on so far, whatever their range."""
    number_knots: NonNegativeInt = 0
    """Also encode each dense feature, and neighbours' votes, by weights of this many knots between
    -2 and 3.5 standard deviations, so that a linear map fits any curve. 0: none."""

    def check(self, name: str) -> None:
        super().check(name)
        if self.number_knots == 1 or (self.number_knots and not self.standardize_numbers):
            raise ValueError(
                f"{name}.number_knots: {self.number_knots}; set 2 or more, and "
                f"{name}.standardize_numbers to true, as knots lie in standard deviations"
            )


@dataclass
class AttendedSettings(NumbersSettings):
    """Settings of `AttendedFeatures`."""

    attention_units: list[Width] = field(default_factory=lambda: [64, 16])
    """Units of the hidden layers of target attention's MLP."""


@dataclass
class DinSettings(AttendedSettings, HeadSettings):
    """Settings of DIN."""

    name: str = "din"


@dataclass
class DinDcnSettings(AttendedSettings, CrossSettings, HeadSettings):
    """Settings of DIN with a DCN-v2 head."""

    name: str = "din_dcn"


@dataclass
class DlrmSettings(DenseSettings):
    """Settings of DLRM."""

    name: str = "dlrm"


@dataclass
class DlrmDcnSettings(CrossSettings, DlrmSettings):
    """Settings of DLRM-DCNv2."""

    name: str = "dlrm_dcn"


@dataclass
class DeepFMSettings(DenseSettings):
    """Settings of DeepFM."""

    name: str = "deepfm"


@dataclass
class SimSettings(NumbersSettings, HeadSettings):
    """Settings of SIM."""

    name: str = "sim"
    search_top_k: PositiveInt = 50
    """Items of each history that are attended to, at most: those most similar to the target, by
    content (by ID vectors without content)."""
    search_heads: PositiveInt = 2
    """Heads of the attention to these items."""
    time_gaps: str | None = None
    """Parallel list with the age of each item; default: the number of newer items."""


@dataclass
class EncoderSettings:
    """Settings of `SequenceEncoder`, in which the items of a history attend to each other."""

    sequence_dim: Width = 32
    """Width of the token of a history item, a multiple of the heads."""
    sequence_layers: PositiveInt = 2
    """Layers of attention; in the last one only the target attends."""
    sequence_heads: PositiveInt = 2
    """Heads of each layer."""
    sequence_dropout: Dropout = 0.0
    """Dropout of each event's token and each layer's residual branches. SASRec has 0.2 to 0.5."""
    recent_items: PositiveInt = 64
    """Latest items of a history that attend to each other. Older ones enter only the last layer,
    so that cost does not grow with the square of the history."""
    time_gaps: str | None = None
    """Parallel list with the age of each item; default: the order alone."""
    gap_scale: GapScale = "linear"
    """Scale of these ages. linear: a unit such as seconds; log_days: log10(1 + days) / 2, as
    `recsys prepare` writes them."""


@dataclass
class SequenceSettings(EncoderSettings, NumbersSettings, HeadSettings):
    """Settings of ranking models over a sequence encoder."""


@dataclass
class HstuSettings(SequenceSettings):
    """Settings of HSTU."""

    name: str = "hstu"


@dataclass
class TransformerSettings(SequenceSettings):
    """Settings of the causal transformer."""

    name: str = "transformer"


@dataclass
class MmoeSettings(AttendedSettings):
    """Settings of MMoE."""

    name: str = "mmoe"
    num_experts: PositiveInt = 4
    """Experts that all labels share."""


@dataclass
class QuerySettings(EncoderSettings, RetrievalSettings):
    """Settings of the tower of users."""

    history_encoder: Literal["mean", "transformer", "hstu"] = "mean"
    """Input of the user tower from the history. mean: its mean vectors. transformer, hstu: also the
    state of a token appended to the history, after the layers of that backbone."""
    query_features: list[str] = field(default_factory=list)
    """Columns of the user besides the group's column; columns of the item do not belong here."""
    history_half_lives: list[PositiveFloat] = field(default_factory=list)
    """Half-lives, in newer items, of further means of the history: an item with k newer ones has
    the weight 2^(-k / half-life). For logs in which the last few items say most."""


@dataclass
class TwoTowerSettings(QuerySettings):
    """Settings of the two towers."""

    name: str = "two_tower"
    tower_dim: Width = 32
    """Width of a tower's vector."""
    temperature: PositiveFloat = 0.1
    """Divisor of the dot products of the vectors, which have length one."""
    history_in_item_tower: bool = False
    """Whether the query also has the mean of the history's item vectors, one weighted by each list
    beside the history and one by each of `history_half_lives`, with learned weights (FISM, Kabbur
    2013; CORE, arXiv 2204.11067)."""
    target_positions: Literal["last", "all"] = "last"
    """Items that a softmax loss predicts, each from the items before it. last: the item of each
    row. all: also history items that are the user's earlier rows; these rows are then left out, so
    that an epoch reads an event once. `batch_size` counts histories. The model reads no lists
    beside the history, and the transformer has biases by the distance of items."""

    def check(self, name: str) -> None:
        super().check(name)
        if self.target_positions == "last":
            return
        problems = {
            "loss": self.loss == "pointwise",
            "query_features": bool(self.query_features),
            "time_gaps": self.time_gaps is not None,
        }
        if wrong := [setting for setting, is_set in problems.items() if is_set]:
            raise ValueError(
                f"{name}.target_positions: all, but {name}.{wrong[0]} is "
                f"{getattr(self, wrong[0])}: it takes a softmax loss, and neither columns of the "
                "row nor lists beside its history, which are of its moment; change one of them"
            )


@dataclass
class GenerativeSettings(QuerySettings):
    """Settings of generative retrieval."""

    name: str = "generative"
    loss: RetrievalLossName = "codes"
    """codes, the only one: cross-entropy of each code of the target item."""
    history_encoder: Literal["mean", "transformer", "hstu"] = "transformer"
    """As in two_tower; its settings are those of the decoder, too."""
    depths: list[PositiveInt] = field(default_factory=lambda: [10, 50])
    """Lengths k of the top-k lists to measure, as in two_tower."""
    semantic_ids: str | None = None
    """Folder of `recsys semantic-ids` with the codes of the items, read when a run begins; default:
    the digits of the item's row number, which carry no meaning."""
    code_levels: PositiveInt = 3
    """Levels of these codes."""
    num_codes: PositiveInt = 256
    """Number of codes of each level, and most items that may share all their codes."""
    decoder_layers: PositiveInt = 2
    """Layers of the decoder."""
    beam_size: PositiveInt = 50
    """Code prefixes that a beam search keeps at each level; at least the largest of `depths`."""

    def check(self, name: str) -> None:
        super().check(name)
        if self.beam_size < max(self.depths):
            raise ValueError(
                f"{name}.beam_size: {self.beam_size}, which finds no list of {max(self.depths)} "
                "items; raise it, or shorten depths"
            )
