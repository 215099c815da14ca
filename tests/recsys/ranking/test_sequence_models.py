"""HSTU and the transformer equal a padded [history; target] under one mask, in plain PyTorch."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.layers import sequences
from recsys.ranking.layers.causal_layers import HstuLayer, TransformerEncoder, TransformerLayer
from recsys.ranking.layers.sequence_encoder import (
    SequenceEncoder,
    TimeGaps,
    doubling_buckets,
    times_between,
)
from recsys.serving.ranking_graph import RankingGraph
from tests.recsys.ranking.ranking_inputs import CONTENT, CONTENT_DIM, DIMENSIONS, inputs
from tests.recsys.ranking.test_backbones import by_content, model_of
from tests.recsys.serving.test_ranking_graph import graph_of, request

LENGTHS = torch.tensor([3, 0, 7, 1])
SETTINGS: dict[str, Any] = {"sequence_dim": 8, "sequence_heads": 2, "sequence_layers": 3}
WITH_AGES = replace(DIMENSIONS, num_parallel=2, parallel_names=("liked", "age"))
by_name = pytest.mark.parametrize("name", ["hstu", "transformer"])


def with_ages(batch: Batch) -> Batch:
    """The batch with ages in seconds, which fall from each event to the next."""
    generator = torch.Generator().manual_seed(0)
    ages = [
        (10.0 ** (6 * torch.rand(int(length), generator=generator))).sort(descending=True).values
        for length in batch.history.lengths
    ]
    values = torch.cat([batch.history.values, torch.cat(ages).unsqueeze(1)], dim=1)
    return replace(batch, history=replace(batch.history, values=values))


def sequence_model(name: str, content: ContentSettings | None = CONTENT, **settings: Any) -> Any:
    """A small model with ages, of weights that are not those of a beginning."""
    all_settings = SETTINGS | {"time_gaps": "age"} | settings
    model = model_of(name, content, WITH_AGES, **all_settings)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


class Padded:
    """[history; target] of each row, padded: the target stands behind the last event.

    Shapes: B rows, L longest history and the target.
    """

    def __init__(self, model: SequenceEncoder, ids: Any, content: Any, batch: Batch) -> None:
        lengths, recent = batch.history.lengths, model.recent_items
        rows, longest = len(lengths), int(lengths.max()) + 1
        self.steps = torch.arange(longest).expand(rows, -1)  # [B, L]
        self.lengths = lengths.unsqueeze(1)
        self.ages = torch.zeros(rows, longest)
        states = torch.zeros(rows, longest, 8)
        sizes, tokens = [int(length) for length in lengths], model.tokens
        for row, (items, values) in enumerate(
            zip(batch.history.index.split(sizes), batch.history.values.split(sizes))
        ):
            joined = torch.cat([ids.history[items], ids.target[[row]]]) @ tokens.id_map.weight.T
            if tokens.content_map is not None:
                vectors = torch.cat([content.read_history()[0][items], content.target[[row]]])
                joined = joined + vectors @ tokens.content_map.weight.T
            assert tokens.list_map is not None
            event_terms = tokens.of_event + values[:, :1] @ tokens.list_map.weight.T
            joined = joined + torch.cat([event_terms, tokens.of_target.unsqueeze(0)])
            states[row, : len(joined)] = joined
            self.ages[row, : len(items)] = values[:, 1]
        self.states = states
        self.causal = self.steps.unsqueeze(2) >= self.steps.unsqueeze(1)  # [B, L, L]
        self.is_recent = (self.steps >= self.lengths - recent) & (self.steps <= self.lengths)
        self.recent, self.newer = recent, (self.lengths - 1 - self.steps).clamp(0, recent)

    def run(self, model: SequenceEncoder) -> Tensor:  # [B, D]
        """All layers over all places, one mask each, then the target's state."""
        states, is_event = self.states, (self.steps < self.lengths).unsqueeze(2)
        if isinstance(model, TransformerEncoder):
            assert model.ages is not None
            embeddings = model.places(self.newer) + model.ages(doubling_buckets(self.ages))
            states = states + embeddings * is_event
        states = torch.where(is_event, model.dropout(states), states)
        for number, layer in enumerate(model.layers, 1):
            is_last = number == len(model.layers)
            read = self.steps <= self.lengths if is_last else self.is_recent
            new = self.layer(layer, states, self.causal & read.unsqueeze(1))
            states = torch.where(read.unsqueeze(2), new, states)
        return model.norm(states[torch.arange(len(states)), self.lengths.squeeze(1)])

    def layer(self, layer: Any, states: Tensor, mask: Tensor) -> Tensor:
        """One layer over [B, L, D], under a mask [B, L, L]."""
        if isinstance(layer, TransformerLayer):
            key, value, query = self.heads(layer.kvq(layer.norm(states)), 3)
            scores = query @ key.transpose(2, 3) / math.sqrt(key.shape[3])
            weights = scores.masked_fill(~mask.unsqueeze(1), -1e9).softmax(dim=3)
            attended = layer.output((weights @ value).transpose(1, 2).flatten(2))
            states = states + layer.dropout(attended)
            return states + layer.dropout(layer.hidden(layer.hidden_norm(states)))
        assert isinstance(layer, HstuLayer) and layer.of_times is not None
        kvqu = F.silu(layer.kvqu(layer.norm(states)))
        key, value, query = self.heads(kvqu[..., : 3 * 8], 3)
        distances = (self.steps.unsqueeze(2) - self.steps.unsqueeze(1)).clamp(0, self.recent + 1)
        gaps = doubling_buckets(self.ages.unsqueeze(1) - self.ages.unsqueeze(2))
        biases = (layer.of_places[:, distances] + layer.of_times[:, gaps]).transpose(0, 1)
        weights = F.silu(query @ key.transpose(2, 3) + biases) / self.recent
        summed = ((weights * mask.unsqueeze(1)) @ value).transpose(1, 2).flatten(2)
        return states + layer.dropout(layer.output(layer.sum_norm(summed) * kvqu[..., 3 * 8 :]))

    def heads(self, joined: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split [B, L, count * D] into value [B, 2 heads, L, D / 2]."""
        return joined.unflatten(2, (count, 2, -1)).permute(2, 0, 3, 1, 4).unbind()


class Halved(nn.Module):
    """In place of dropout, whose draws differ between a padded tensor and a flat one."""

    def forward(self, values: Tensor) -> Tensor:
        return values / 2


def interest_of(model: nn.Module, ids: Any, content: Any, batch: Batch) -> Tensor:
    """The target's state that the model computes."""
    states: list[Tensor] = []
    handle = model.encoder.norm.register_forward_hook(
        lambda module, arguments, state: states.append(state)
    )
    model(ids, content, batch)
    handle.remove()
    return states[0]


@by_content
@by_name
@pytest.mark.parametrize(("recent", "cells"), [(3, 2**20), (64, 2**20), (64, 60)])
def test_outputs_and_gradients_equal_a_padded_reference(
    name: str,
    content: ContentSettings | None,
    recent: int,
    cells: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequences, "BLOCK_CELLS", cells)  # 60: a block for each sequence
    model = sequence_model(name, content, recent_items=recent)
    ids, vectors, batch = inputs(LENGTHS)
    index = torch.tensor([0, 1, 2, 1, 0, 3, 4, 5, 8, 1, 10])  # items repeat
    batch = with_ages(batch)
    batch.history.index = index
    leaves = [ids.history.requires_grad_(), ids.target.requires_grad_()]
    encoder = model.encoder
    for module in (encoder, *encoder.layers):
        module.dropout = Halved()
    leaves += [*encoder.tokens.parameters(), *encoder.layers.parameters()]
    weights = torch.randn(4, 8)

    actual = interest_of(model, ids, vectors, batch)
    expected = Padded(encoder, ids, vectors, batch).run(encoder)

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad((state * weights).sum(), leaves) for state in (actual, expected)
    ]
    for actual_gradient, expected_gradient in zip(*gradients):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@by_content
@by_name
@torch.no_grad()
def test_the_query_of_two_towers_reads_a_token_behind_the_history(
    name: str, content: ContentSettings | None
) -> None:
    """The padded reference with a target of zeros has the token's parameter alone."""
    settings = SETTINGS | {"time_gaps": "age", "recent_items": 3, "history_encoder": name}
    towers = model_of("two_tower", content, WITH_AGES, **settings)
    torch.manual_seed(1)
    for parameter in towers.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids, vectors, batch = inputs(LENGTHS)
    batch = with_ages(batch)
    nothing = replace(ids, target=torch.zeros_like(ids.target))
    target, modalities = (
        torch.zeros_like(vector) for vector in (vectors.target, vectors.target_modalities)
    )
    history, history_modalities = vectors.read_history()
    no_content = ContentVectors(target, history, modalities, history_modalities)

    expected = Padded(towers.encoder, nothing, no_content, batch).run(towers.encoder)
    torch.testing.assert_close(interest_of(towers, ids, vectors, batch), expected)
    query, item = (getattr(towers(ids, vectors, batch), key) for key in ("query", "item"))
    changed_ids = replace(ids, target=ids.target.flip(0))
    assert torch.equal(towers(changed_ids, vectors, batch).query, query)
    assert not torch.equal(towers(changed_ids, vectors, batch).item, item)


@by_content
@torch.no_grad()
def test_the_query_adds_weighted_means_of_the_item_vectors_of_its_history(
    content: ContentSettings | None,
) -> None:
    towers = model_of(
        "two_tower",
        content,
        history_in_item_tower=True,
        history_half_lives=[2.0],
        tower_dim=8,
        temperature=1.0,
    )
    # Of the mean, by `liked`, and by the half-life.
    assert towers.history_weights.tolist() == [[1.0, 0.0, 1.0]]
    ids, vectors, batch = inputs(LENGTHS)
    towers.history_weights.zero_()
    without_history = towers(ids, vectors, batch).query[:, 0, :8]
    towers.history_weights.copy_(torch.tensor([[2.0, -3.0, 5.0]]))

    items = ids.history
    if content is not None:
        items = torch.cat([items, vectors.read_history()[0]], dim=1)
    item_vectors = F.normalize(towers.item_tower(items), dim=1)
    expected, begin = without_history.clone(), 0
    for row, length in enumerate(LENGTHS.tolist()):
        recent = [0.5 ** (age / 2) for age in reversed(range(length))]
        for position in range(begin, begin + length):
            weight = (2 - 3 * batch.history.values[position, 0]) / length
            weight += 5 * recent[position - begin] / sum(recent)
            expected[row] += weight * item_vectors[position]
        begin += length
    query = towers(ids, vectors, batch).query[:, 0, :8]  # directions of content follow
    torch.testing.assert_close(query, F.normalize(expected, dim=1))
    assert not torch.allclose(query, without_history)


def test_a_query_without_a_history_in_the_schema_cannot_add_its_item_vectors() -> None:
    no_history = replace(DIMENSIONS, has_history=False)
    with pytest.raises(ValueError, match=r"history_in_item_tower is true, and schema.yaml has no"):
        model_of("two_tower", None, no_history, history_in_item_tower=True)
    with pytest.raises(ValueError, match=r"history_half_lives is \[1.0\], and schema.yaml has no"):
        model_of("two_tower", None, no_history, history_half_lives=[1.0])


def test_times_between_events_do_not_depend_on_the_moment_of_the_row() -> None:
    ages = torch.tensor([[700.0, 60.0, 3.0]])
    later = times_between(ages + 1000)
    assert torch.equal(times_between(ages), later)
    assert later[0].tolist() == [[0, 0, 0], [9, 0, 0], [9, 5, 0]]  # later events see earlier ones


def test_ages_of_either_scale_are_the_same_seconds() -> None:
    days = torch.tensor([[0.0], [1.0], [100.0]])
    stored = torch.log10(1 + days) / 2  # as `prepare events` writes an age
    seconds, logarithms = (TimeGaps("age", WITH_AGES, scale) for scale in ("linear", "log_days"))
    flags = torch.ones(3, 1)
    torch.testing.assert_close(
        logarithms.ages(torch.cat([flags, stored], dim=1)),
        seconds.ages(torch.cat([flags, days * 86_400], dim=1)),
        rtol=1e-4,
        atol=0.1,
    )
    assert (seconds.flags, logarithms.flags) == ([0], [0, 1])  # seconds are no flags


def test_buckets_are_rounded_logarithms() -> None:
    gaps = torch.cat(
        [torch.arange(300.0), 2.0 ** torch.arange(8, 24) - 1, torch.tensor([-5, 1e30])]
    )
    expected = [min(int(math.log2(1 + max(gap, 0))), 31) for gap in gaps.tolist()]
    assert doubling_buckets(gaps).tolist() == expected


@by_name
@torch.no_grad()
def test_candidates_with_searched_histories_score_together_as_one_by_one(name: str) -> None:
    graph = graph_of(name, CONTENT)
    searching = RankingGraph(graph.ranking, graph.history_map, CONTENT_DIM, top_k=3)
    together = request(4, 6)
    together = replace(together, target_in_bank=together.target_content)
    names = ("pooled", "dense", "target", "target_items", "target_content", "target_in_bank")
    alone = []
    for row in range(4):
        row_fields = {
            field: [tensor[[row]] for tensor in value] if isinstance(value, list) else value[[row]]
            for field, value in vars(together).items()
            if field in names
        }
        alone.append(searching(*replace(together, **row_fields).arguments()))
    torch.testing.assert_close(searching(*together.arguments()), torch.cat(alone))


@pytest.mark.parametrize("gigabytes", [24, 80])
def test_blocks_of_attention_on_a_gpu_grow_with_its_memory(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int
) -> None:
    card = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    heads, tensors = 4, 5
    scores = sequences._cells_on_gpu() * heads * 4
    assert card.total_memory / 4.1 < tensors * scores <= card.total_memory / 4


@by_name
def test_dropout_is_drawn_in_training_alone(name: str) -> None:
    model = sequence_model(name, sequence_dropout=0.5, dropout=0.0)
    ids = inputs(LENGTHS)
    batch = with_ages(ids[2])
    first, second = (interest_of(model.train(), *ids[:2], batch) for _ in range(2))
    assert not first.equal(second)
    plain = sequence_model(name)
    assert interest_of(model.eval(), *ids[:2], batch).equal(interest_of(plain, *ids[:2], batch))
