"""Encoders in which history items attend to each other, and the target attends to them.

Attention is causal, so a user's history is computed once for all candidates (M-FALCON of HSTU,
arXiv 2402.17152). Items before the latest `ranking.recent_items` enter the last layer alone. Ages
are counted back from the moment of the ranked row.
Shapes: B batch, T tokens of all histories, N history items of the batch, S sequences, L longest
sequence, D width of a token, U unique items, P parallel lists, C labels.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys.config import ContentSettings
from recsys.content.dropout import Dropout
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.sequences import Sequences, build_sequences
from recsys.ranking.settings import EncoderSettings, GapScale
from recsys.ranking.vectors import IDVectors, InputDimensions

NUM_AGES = 32
SECONDS_PER_DAY = 86_400
EXPONENT_BITS, EXPONENT_OF_ONE = 23, 127  # of a float32


def age_row(gaps: Tensor) -> Tensor:  # [K] -> [K]
    """Return floor(log2(1 + gap)), int64 in [0, NUM_AGES): rows of the table of ages."""
    return torch.log2(1 + gaps.double().clamp(min=0)).long().clamp(max=NUM_AGES - 1)


def doubling_buckets(gaps: Tensor) -> Tensor:
    """Return `age_row` of float32 gaps of any shape, by exponents; negative gaps count as 0."""
    bits = (gaps.float().clamp(min=0) + 1).view(torch.int32)
    return ((bits >> EXPONENT_BITS) - EXPONENT_OF_ONE).clamp(max=NUM_AGES - 1).long()


def times_between(ages: Tensor) -> Tensor:  # [S, L] -> int64 [S, L, L]
    """Return the bucket of the time from each event (last axis) to each (second axis)."""
    return doubling_buckets(ages.unsqueeze(1) - ages.unsqueeze(2))


class TimeGaps:
    """Index `column` of history items' ages among the parallel lists, and the ages' scale.

    `flags` are the indices of the lists that models read as numbers: all but ages of linear scale.
    """

    def __init__(
        self, name: str | None, dimensions: InputDimensions, scale: GapScale = "linear"
    ) -> None:
        lists = dimensions.parallel_names
        if name is not None and name not in lists:
            raise ValueError(
                f"ranking.time_gaps is '{name}'; the parallel lists of the history in schema.yaml "
                f"are {list(lists)}"
            )
        self.column = None if name is None else lists.index(name)
        self.scale = scale  # linear: a unit such as seconds; log_days: log10(1 + days) / 2
        dropped = self.column if scale == "linear" else None
        self.flags = [index for index in range(dimensions.num_parallel) if index != dropped]

    def ages(self, values: Tensor) -> Tensor | None:  # [N, P] -> [N, 1]
        if self.column is None:
            return None
        ages = values[:, [self.column]]
        if self.scale == "log_days":
            ages = (torch.pow(10.0, 2 * ages) - 1) * SECONDS_PER_DAY
        return ages.clamp(min=0)


KVPair = tuple[Tensor, Tensor]  # keys and values [T, D] that targets read of events


@dataclass
class Events:
    """Sequences, positions and ages of the tokens that a layer reads."""

    sequences: Sequences
    positions: Tensor  # int64 [T], the number of newer tokens, at most `ranking.recent_items`
    ages: Tensor | None  # float32 [T, 1], or None if no list has them


class EventTokens(nn.Module):
    """ID vectors, content vectors and lists beside the history -> tokens; width 0 omits a part.

    Without `reads_target` the target's token is a parameter that stands for any next item.
    """

    def __init__(
        self, dim: int, id_dim: int, content_dim: int, num_lists: int, reads_target: bool
    ) -> None:
        super().__init__()
        self.reads_target = reads_target
        self.id_map = nn.Linear(id_dim, dim, bias=False)
        self.content_map = nn.Linear(content_dim, dim, bias=False) if content_dim else None
        self.list_map = nn.Linear(num_lists, dim, bias=False) if num_lists else None
        self.of_event, self.of_target = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(
        self,
        ids: IDVectors,
        content: ContentVectors | None,
        history: JaggedHistory,
        sequences: Sequences,
        lists: Tensor,  # [T, P]
    ) -> tuple[Tensor, Tensor]:  # [T, D], [B, D]
        """Return the tokens of events and targets. A collective with content."""
        # Terms of an item alone are added for each unique item, in place of each event.
        items = self.id_map(ids.history) + self.of_event
        if self.content_map is not None:
            assert content is not None
            content_terms = self.content_map(content.read_history()[0])
            if not ids.history_is_unique:
                content_terms = sequences.tokens(content_terms, history)
            items = items + content_terms
        tokens = sequences.tokens(items, history) if ids.history_is_unique else items
        if self.list_map is not None:
            tokens = torch.addmm(tokens, lists, self.list_map.weight.T)
        if not self.reads_target:
            return tokens, self.of_target.expand(ids.target.shape[0], -1)
        target = self.id_map(ids.target) + self.of_target
        if self.content_map is not None:
            assert content is not None
            target = target + self.content_map(content.target)
        return tokens, target


class SequenceEncoder(nn.Module):
    """Layers of attention over the tokens of a history -> the state of the target [B, D].

    A layer maps states of events [T, D] to keys and values (`read`), or to these and new states
    (`history`). `target` maps states of targets [B, D] and keys and values to new states.
    With `embeds_positions` tokens include embeddings of ages and, unless relative, of positions.
    """

    Layer: type[nn.Module]
    embeds_positions = False

    def __init__(
        self,
        settings: EncoderSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
        reads_target: bool = True,
        is_relative: bool = False,
    ) -> None:
        super().__init__()
        dim, heads = settings.sequence_dim, settings.sequence_heads
        if dim % heads:
            raise ValueError(
                f"ranking.sequence_heads is {heads}, which does not divide ranking.sequence_dim "
                f"({dim}); change one of them"
            )
        self.gaps = TimeGaps(settings.time_gaps, dimensions, settings.gap_scale)
        self.recent_items = settings.recent_items
        content_dim, num_lists = 0 if content is None else content.dim, len(self.gaps.flags)
        self.tokens = EventTokens(dim, dimensions.id_dim, content_dim, num_lists, reads_target)
        has_ages = self.gaps.column is not None
        self.layers = nn.ModuleList(
            self.Layer(settings, has_ages, is_relative) for _ in range(settings.sequence_layers)
        )
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(settings.sequence_dropout)
        has_positions = self.embeds_positions and not is_relative
        self.places = nn.Embedding(self.recent_items + 1, dim) if has_positions else None
        self.ages = nn.Embedding(NUM_AGES, dim) if self.embeds_positions and has_ages else None
        for table in (self.places, self.ages):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> Tensor:
        """Return the target's state [B, D] after the last layer. A collective with content."""
        if batch.history.full is not None:
            return self._at_all_positions(ids, content, batch)
        history = batch.history.jagged()
        sequences = build_sequences(history)
        ages = self.gaps.ages(batch.history.recorded_values)
        ages = None if ages is None else sequences.per_token(ages)
        events = Events(sequences, sequences.ages().clamp(max=self.recent_items), ages)
        lists = sequences.per_token(batch.history.values[:, self.gaps.flags])
        tokens, target = self.tokens(ids, content, history, sequences, lists)
        return self.encoded(tokens.float(), target.float(), events)

    def encoded(self, tokens: Tensor, target: Tensor, events: Events) -> Tensor:  # [B, D]
        tokens = self.dropout(self._positioned(tokens, events))
        *lower, last = cast(Any, self.layers)
        if lower:
            sequences = events.sequences
            latest = sequences.latest(self.recent_items)
            positions = sequences.take_latest(events.positions.unsqueeze(1), latest).squeeze(1)
            ages = None if events.ages is None else sequences.take_latest(events.ages, latest)
            recent, states = Events(latest, positions, ages), sequences.take_latest(tokens, latest)
            for layer in lower:
                states, read = layer.history(states, recent)
                target = layer.target(target, read, recent)
            tokens = sequences.put_latest(tokens, states, latest)
        target = last.target(target, last.read(tokens), events)
        return self.norm(target)

    def _at_all_positions(
        self, ids: IDVectors, content: ContentVectors | None, batch: Batch
    ) -> Tensor:  # [B, D]
        """Return the result of `forward`, by one causal pass over each whole history."""
        history, full = batch.history.jagged(), batch.history.full
        assert full is not None
        source = full.jagged(history.num_items)
        sequences = build_sequences(source)
        lists = ids.target.new_empty(len(full.index), 0)
        tokens, target = self.tokens(ids, content, source, sequences, lists)
        events, target = Events(sequences, sequences.ages(), None), target.float()
        states = self.dropout(self._positioned(tokens.float(), events))
        prefixes = replace(history, index=full.positions, num_items=len(full.index))
        prefix_events = Events(build_sequences(prefixes), prefixes.ages, None)
        *lower, last = cast(Any, self.layers)
        for layer in lower:
            states, read = layer.history(states, events)
            target = layer.target(target, tuple(map(prefixes.gather, read)), prefix_events)
        target = last.target(target, tuple(map(prefixes.gather, last.read(states))), prefix_events)
        return self.norm(target)

    def _positioned(self, tokens: Tensor, events: Events) -> Tensor:  # [T, D] -> [T, D]
        if self.places is not None:
            tokens = tokens + self.places(events.positions)
        if self.ages is not None:
            assert events.ages is not None
            tokens = tokens + self.ages(doubling_buckets(events.ages.squeeze(1)))
        return tokens
