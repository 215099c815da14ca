"""Candidates of one user score as the rows of a batch with equal histories do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.config import ContentSettings, ranking_settings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import TargetItems
from recsys.model.build import build_ranking
from recsys.model.precision import InBfloat16, use_bfloat16
from recsys.ranking.layers.evidence import NUM_VOTES
from recsys.ranking.layers.target_attention import TargetAttention
from recsys.ranking.vectors import IDVectors
from recsys.serving.exported_graph import ExportedGraph, _has_bfloat16, export_graph
from recsys.serving.package import GRAPH
from recsys.serving.ranking_graph import RankingGraph, RankingInputs, SharedHistory
from tests.recsys.ranking.ranking_inputs import (
    CONTENT,
    CONTENT_DIM,
    DIMENSIONS,
    ID_DIM,
    NUM_DENSE,
    inputs,
)
from tests.recsys.ranking.test_backbones import by_backbone, by_content, model_of
from tests.recsys.ranking.test_neighbours import WITH_ITEMS, neighbours_of

WIDTH = CONTENT_DIM * (1 + len(CONTENT.modalities))
SIZES = [(3, 4), (1, 6), (1, 1), (5, 0)]  # candidates, history items


def request(num_rows: int, num_items: int, seed: int = 0) -> RankingInputs:
    """Random vectors of a user and candidates."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return RankingInputs(
        pooled=[random(num_rows, 3), random(num_rows, 5)],
        dense=random(num_rows, NUM_DENSE),
        target=random(num_rows, ID_DIM),
        history=random(num_items, ID_DIM),
        parallel=random(num_items, 1).sign().clamp(min=0),
        target_items=torch.arange(num_rows),
        history_items=torch.arange(num_items),
        target_content=random(num_rows, WIDTH),
        history_content=random(num_items, WIDTH),
        target_in_bank=torch.zeros(num_rows, 0),
    )


def tiled(request: RankingInputs, history_map: nn.Module | None) -> tuple[Any, Any, Any]:
    """The same request as a batch in which each row has a history of its own."""
    num_rows, num_items = len(request.target), len(request.history)
    lengths = torch.full((num_rows,), num_items)
    content = None
    if history_map is not None:
        target_modalities, history_modalities = (
            vectors[:, CONTENT_DIM:].unflatten(1, (-1, CONTENT_DIM))
            for vectors in (request.target_content, request.history_content)
        )
        mapped = history_map(request.history_content[:, :CONTENT_DIM])
        target = request.target_content[:, :CONTENT_DIM]
        content = ContentVectors(target, mapped, target_modalities, history_modalities)
    batch = inputs(lengths)[2]
    history = replace(
        batch.history,
        values=request.parallel.repeat(num_rows, 1),
        index=torch.arange(num_items).repeat(num_rows),
        items=request.history_items,
    )
    target = TargetItems(request.target_items)
    batch = replace(batch, dense_features=request.dense, target=target, history=history)
    return IDVectors(request.pooled, request.target, request.history), content, batch


def graph_of(name: str, content: ContentSettings | None) -> RankingGraph:
    history_map = None if content is None else nn.Linear(CONTENT_DIM, CONTENT_DIM, bias=False)
    return RankingGraph(model_of(name, content), history_map, 0 if content is None else CONTENT_DIM)


@by_content
@by_backbone
@torch.no_grad()
def test_candidates_of_one_user_score_as_rows_of_a_batch(
    name: str, content: ContentSettings | None
) -> None:
    graph = graph_of(name, content)

    for size in SIZES:
        rows = request(*size)
        expected = graph.ranking(*tiled(rows, graph.history_map))
        expected = expected if isinstance(expected, torch.Tensor) else expected.logits
        torch.testing.assert_close(graph(*rows.arguments()), expected, rtol=1e-5, atol=1e-6)


LATEST = replace(CONTENT, history=replace(CONTENT.history, recent=[1, 3]))


@pytest.mark.parametrize("name", ["din", pytest.param("dlrm", marks=pytest.mark.long)])
@torch.no_grad()
def test_similarities_to_the_latest_items_are_those_of_a_batch(name: str, tmp_path: Path) -> None:
    graph = graph_of(name, LATEST)
    loaded = exported(graph, name, tmp_path)
    for size in SIZES:
        rows = request(*size)
        expected = graph.ranking(*tiled(rows, graph.history_map))
        for scored in (graph(*rows.arguments()), loaded(*rows.arguments())):
            torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_counts_are_the_same_curves_in_a_package(tmp_path: Path) -> None:
    settings = ranking_settings("din_dcn", standardize_numbers=True, number_knots=12)
    model = build_ranking(settings, DIMENSIONS, CONTENT).eval()
    graph = RankingGraph(model, nn.Linear(CONTENT_DIM, CONTENT_DIM, bias=False), CONTENT_DIM)
    loaded = exported(graph, "din_dcn", tmp_path)
    for size in SIZES:
        rows = request(*size)
        expected = model(*tiled(rows, graph.history_map))
        for scored in (graph(*rows.arguments()), loaded(*rows.arguments())):
            torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_search_keeps_the_items_whose_content_is_most_like_the_candidate() -> None:
    graph, rows = graph_of("din", CONTENT), request(1, 3)
    like = torch.stack([rows.target_content[0], -rows.target_content[0]])
    rows = replace(rows, history_content=torch.cat([rows.history_content[:1] * 0, like]))
    rows = replace(rows, target_in_bank=rows.target_content)
    alone = {
        name: value[1:2]
        for name, value in vars(rows).items()
        if name in ("history", "parallel", "history_items", "history_content")
    }

    searching = RankingGraph(graph.ranking, graph.history_map, CONTENT_DIM, top_k=1)

    expected = graph(*replace(rows, **alone).arguments())
    torch.testing.assert_close(searching(*rows.arguments()), expected)


def exported(graph: RankingGraph, name: str, folder: Path) -> ExportedGraph:
    """The graph as a scorer loads it."""
    export_graph(graph, request(2, 2), name, folder / GRAPH)
    return ExportedGraph.load(folder / GRAPH)


def test_of_an_item_at_many_places_the_latest_is_found() -> None:
    """One matrix product in float32 rounds the same vectors otherwise, by their place in it."""
    torch.manual_seed(0)
    vectors, queries = torch.randn(5, 96), torch.randn(40, 96)
    events = torch.tensor([1, 0, 2, 4, 3, 1, 2, 0, 3, 4, 1])
    for query in queries:
        history = SharedHistory(1, len(events), events.device, is_searched=True)
        scores = history.dot(query[None], vectors[events])
        best = int((vectors @ query).argmax())
        latest = int((events == best).nonzero().max())
        assert history.highest(scores, 1).tolist() == [latest]


def test_a_graph_that_searches_histories_is_exported_with_neighbours(tmp_path: Path) -> None:
    dimensions = replace(WITH_ITEMS, num_dense=NUM_DENSE + NUM_VOTES)
    model = build_ranking(ranking_settings("dlrm"), dimensions, CONTENT).eval()
    history_map = nn.Linear(CONTENT_DIM, CONTENT_DIM, bias=False)
    neighbours = neighbours_of("liked", CONTENT)
    graph = RankingGraph(model, history_map, CONTENT_DIM, top_k=2, neighbours=neighbours)
    shapes = request(5, 7)
    shapes = replace(shapes, target_in_bank=shapes.target_content)

    export_graph(graph, shapes, "dlrm", tmp_path / GRAPH)  # and compares it with the graph


def test_a_region_of_bfloat16_without_operations_can_be_loaded(tmp_path: Path) -> None:
    graph = graph_of("sim", None)  # its search without gradients leaves such a region before it
    use_bfloat16([graph.ranking], torch.device("cpu"))

    exported(graph, "sim", tmp_path)


@pytest.mark.parametrize("name", ["dlrm", "transformer"])
@torch.no_grad()
def test_models_of_kernels_that_trained_in_bfloat16_are_exported(name: str, tmp_path: Path) -> None:
    graph, rows = graph_of(name, None), request(4, 7)
    use_bfloat16([graph.ranking], torch.device("cpu"))
    scores = exported(graph, name, tmp_path)(*rows.arguments())
    torch.testing.assert_close(scores, graph(*rows.arguments()), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_compiled_graphs_are_compared_by_their_precision(is_rounded: bool, tmp_path: Path) -> None:
    graph = graph_of("din_dcn", None)
    if is_rounded:
        use_bfloat16([graph.ranking], torch.device("cpu"))
    program = export_graph(graph, request(2, 2), "din_dcn", tmp_path / GRAPH)
    assert _has_bfloat16(program) == is_rounded


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_a_graph_in_bfloat16_scores_nearly_as_in_float32(dtype: str, tmp_path: Path) -> None:
    settings = ranking_settings("din_dcn", ensemble_members=4)
    model = build_ranking(settings, DIMENSIONS, CONTENT).eval()
    history_map = nn.Linear(CONTENT_DIM, CONTENT_DIM, bias=False)
    rows = request(4, 70)
    exact = RankingGraph(model, history_map, CONTENT_DIM)(*rows.arguments())
    if dtype == "bf16":
        use_bfloat16([model], torch.device("cpu"))
    graph = RankingGraph(model, history_map, CONTENT_DIM, bfloat16=True)

    for scored in (graph, exported(graph, "din_dcn", tmp_path)):
        rounded = scored(*rows.arguments())
        torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=1e-2)
        assert not rounded.equal(exact)
    assert isinstance(model, InBfloat16) == (dtype == "bf16")


def test_attention_to_further_histories_is_in_bfloat16_too() -> None:
    attention = TargetAttention(ID_DIM, 0, [6, 3])
    use_bfloat16([extra := nn.Sequential(attention)], torch.device("cpu"))
    graph = RankingGraph(nn.Identity(), further_histories=extra, bfloat16=True)
    assert graph.further_histories is not None
    assert graph.further_histories[0].rounds_shared and not attention.rounds_shared
    assert not isinstance(graph.further_histories, InBfloat16)
    assert RankingGraph(nn.Identity()).further_histories is None


def shape_of_values(ids: IDVectors) -> Tensor:
    return ids.target[: int(ids.target.sum() > 0)]


def number_of_candidates(ids: IDVectors) -> Tensor:
    return ids.target + ids.target.new_ones(len(ids.target), 1)


def max_history_items(ids: IDVectors) -> Tensor:
    return ids.target * (1 if ids.history.shape[0] <= 100 else 2)


class SumOf(nn.Module):
    """A model that scores by the sum of the vectors that a function returns."""

    def __init__(self, vectors: Callable[[IDVectors], Tensor]) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, ids: IDVectors, content: Any, batch: Any) -> Tensor:
        return self.vectors(ids).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (shape_of_values, "depends on values"),
        (number_of_candidates, "fixes the number of candidates to 5; .*len"),
        (max_history_items, "0 to 100 history items only"),
    ],
)
def test_a_model_whose_graph_would_be_wrong_for_other_requests_is_refused(
    vectors: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)ranking\.name 'mine:Model' .*{message}"):
        exported(RankingGraph(SumOf(vectors)), "mine:Model", tmp_path)
