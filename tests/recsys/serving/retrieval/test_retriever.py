"""Items that an index yields are those that the evaluation ranks highest, by raw id."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.cli import main
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.serving.new_items.add import add_items
from recsys.serving.retrieval import Retrieved, Retriever, baselines
from recsys.serving.retrieval.catalogue import unit
from recsys.serving.retrieval.item_vectors import (
    INDEX,
    VECTORS,
    UserTower,
    build_index,
    export_vectors,
    search_index,
)
from recsys.serving.retrieval.retriever import _requests
from recsys.storage.location import Location
from tests.recsys.serving.retrieval.retrieval_runs import NUM_ITEMS, liked_rows
from tests.recsys.test_docstring_examples import run_example

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def retriever(towers: Path) -> Retriever:
    return Retriever.load(towers / "vectors")


@pytest.fixture(scope="module")
def by_content(towers: Path) -> Retriever:
    with joined_ranks("cpu") as ranks:
        export_vectors(towers / "run", towers / "content", "content", "ivf", ranks)
    return Retriever.load(towers / "content")


def test_recall_of_a_flat_index_is_that_of_the_evaluation(
    towers: Path, retriever: Retriever
) -> None:
    metrics = json.loads((towers / "run" / "metrics.json").read_text())
    expected = metrics["test"]["retrieval"]
    rows = list(liked_rows(towers))
    ranked = [(retriever.retrieve(user, history, 100).items, item) for user, history, item in rows]

    assert expected["num_samples"] == len(rows)
    assert 0 < expected["recall@10"] < expected["recall@100"] < 1
    for depth in (10, 50, 100):
        recall = np.mean([item in items[:depth] for items, item in ranked])
        assert recall == expected[f"recall@{depth}"]


def test_recall_of_a_blend_is_that_of_the_comparison(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal_weights(scores: dict[str, np.ndarray], _: Any) -> tuple[dict[str, float], float]:
        return {name: 1 / max(float(values.std()), 1e-6) for name, values in scores.items()}, 0.0

    # The best weights of so few rows leave out most parts, and items tie.
    monkeypatch.setattr(baselines, "best_weights", equal_weights)
    run, out = towers / "run", tmp_path / "blend"
    command = ["export-vectors", "--run", str(run), "--out", str(out), "--index", "flat"]
    assert main([*command, "--blend", "true"]) == 0
    assert main(["baselines", "--run", str(run)]) == 0
    report = json.loads((run / "baselines_test.json").read_text())["blend with model"]
    assert len(report["weights"]) == 7 and min(report["weights"].values()) > 0
    blended = Retriever.load(out)
    results = [
        (blended.retrieve(user, history, 50).items, item)
        for user, history, item in liked_rows(towers)
    ]
    for depth in (10, 50):
        recall = np.mean([item in items[:depth] for items, item in results])
        assert recall == pytest.approx(report["all"][f"recall@{depth}"])

    table = tmp_path / "retrieved.parquet"
    command = ["retrieve", "--package", str(out), "--input", str(towers / "data" / "test")]
    assert main([*command, "--top-k", "50", "--out", str(table)]) == 0
    requests = pq.read_table(towers / "data" / "test").to_pylist()
    first = next(number for number, row in enumerate(requests) if row["liked"] > 0)
    assert pq.read_table(table)["items"][first].as_py() == results[0][0]


def test_a_blend_needs_an_index(towers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export-vectors", "--run", str(towers / "run"), "--out", "none", "--blend", "true"]
    assert main(command) == 1
    assert "and --index flat or hnsw" in capsys.readouterr().err


def test_ids_are_those_of_the_items_files(towers: Path, retriever: Retriever) -> None:
    user, history, _ = next(liked_rows(towers))

    result = retriever.retrieve(user, history, count=1000)

    items = pq.read_table(towers / "data" / "items")["item"].to_pylist()
    assert sorted(result.items) == sorted(items) and len(items) == NUM_ITEMS - 1
    assert (np.diff(result.scores) <= 0).all()
    best = result.items[:3]
    assert retriever.retrieve(user, history, 5, exclude=best).items == result.items[3:8]


@pytest.mark.parametrize("obj", [Retrieved, Retriever])
def test_the_example_in_the_docstring_runs(
    towers: Path, obj: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(towers)
    run_example(obj, {})


def test_content_vectors_are_those_of_the_bank(towers: Path, by_content: Retriever) -> None:
    with joined_ranks("cpu") as ranks:
        job = load_run(towers / "run", None, ranks, "cpu")
    vocabulary, branch = job.schema.vocabularies["item"], job.em3.content
    assert branch is not None and branch.bank is not None
    rows = vocabulary.rows_of(by_content.ids)
    bank = branch.bank.lookup(torch.from_numpy(rows))[0][:, : branch.dim].numpy()

    np.testing.assert_allclose(by_content.vectors, bank, rtol=1e-4, atol=1e-5)
    assert len(np.unique(bank, axis=0)) > NUM_ITEMS / 2


def test_content_is_searched_by_the_mean_of_the_history(by_content: Retriever) -> None:
    ids = by_content.ids.to_pylist()
    vectors = torch.nn.functional.normalize(torch.from_numpy(by_content.vectors.copy()), dim=1)
    history = [ids[7], "never seen", ids[9]]
    query = (vectors[7] + vectors[9]) / 2

    np.testing.assert_allclose(by_content.query({}, history), query, rtol=0, atol=1e-6)
    result = by_content.retrieve({}, {"history": history}, 3)
    expected = [vectors[ids.index(item)] @ query for item in result.items]
    np.testing.assert_allclose(result.scores, expected, atol=1e-6)
    with pytest.raises(ValueError, match="history"):
        by_content.retrieve({}, ["never seen"])
    for no_list in (ids[7], 7):  # of a text, each letter would be an item
        with pytest.raises(ValueError, match="'history' is no list"):
            by_content.retrieve({}, {"history": no_list})


def test_lists_of_categories_are_read_from_several_row_groups(tmp_path: Path) -> None:
    items = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table({"seen": pa.ListArray.from_arrays(pa.array([0, 2, 2, 3], pa.int32()), items)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    reader: Any = SimpleNamespace(columns=lambda names: ([], names))
    histories = [history for *_, history in _requests(str(tmp_path), reader)]
    assert histories == [{"seen": categories} for categories in (["a", "b"], [], ["a"])]


def test_files_need_no_columns_that_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("""
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 2}
  item: {kind: id, num_embeddings: 2}
  age: {kind: dense}
  seen: {kind: sequence, shares: item, parallel: [seen_price]}
  price: {kind: dense}
  liked: {kind: label}
features:
  - {by: [user], columns: [age]}
  - {by: [item], columns: [price], beside: {seen_price: price}}
""")
    manifest = SimpleNamespace(pooled=["user"], dense=["age"])
    tower: Any = SimpleNamespace(schema=load_schema(Location.of(tmp_path)), manifest=manifest)
    assert UserTower.columns(tower, []) == (["user"], ["seen"])
    columns = ["user", "age"], ["seen", "seen_price"]
    assert UserTower.columns(tower, ["age", "seen_price"]) == columns


def test_ids_of_another_type_are_not_excluded_in_silence(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = np.zeros((1, retriever.manifest.dim), np.float32)
    best = retriever.search(queries, 1)[0].items
    assert retriever.search(queries, 1, [np.array(best)])[0].items != best
    with pytest.raises(ValueError, match="exclude"):
        retriever.search(queries, 1, [[7]])
    with pytest.raises(ValueError, match=r"exclude: 'item 3' is no list"):
        retriever.search(queries, 1, ["item 3"])
    monkeypatch.setattr(retriever, "ids", pa.array(range(len(retriever.ids))))
    with pytest.raises(ValueError, match=r"exclude: 7\.5 is no id"):
        retriever.search(queries, 1, [[7.5]])
    assert 7 not in retriever.search(queries, len(retriever.ids), [[7.0]])[0].items


def test_requests_of_files_are_answered_in_their_order(
    towers: Path, retriever: Retriever, by_content: Retriever, capsys: pytest.CaptureFixture[str]
) -> None:
    out, queries = towers / "found.parquet", towers / "vectors" / "queries" / "request.json"
    argv = ["--package", str(towers / "vectors"), "--top_k", "4", "--log_level", "warning"]
    test_rows = ["--input", str(towers / "data" / "test"), "--out", str(out)]
    assert main(["retrieve", *argv, *test_rows]) == 0
    items = pq.read_table(out)["items"]
    rows = pq.read_table(towers / "data" / "test").to_pylist()
    assert len(items) == len(rows) and items.type.value_type == pa.string()
    for index in (0, len(rows) - 1):
        history = {name: rows[index][name] for name in ("history", "history_liked")}
        alone = retriever.retrieve(rows[index], history, 4)
        assert items[index].as_py() == alone.items

    capsys.readouterr()
    assert main(["retrieve", *argv, "--input", str(queries)]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == items[0].as_py()

    argv[1] = str(towers / "content")  # some rows have no history
    assert main(["retrieve", *argv, *test_rows]) == 0
    lengths = [len(items) for items in pq.read_table(out)["items"].to_pylist()]
    assert lengths == [4 if row["history"] else 0 for row in rows]


@pytest.mark.parametrize("name", [VECTORS, INDEX, "queries/graph.pt2"])
def test_a_file_that_differs_is_refused_by_name(towers: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(towers / "vectors", tmp_path / "vectors"))
    file = copy / name
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ValueError, match=str(file)):
        Retriever.load(copy)


def test_items_added_to_the_user_tower_are_in_the_histories_of_queries(
    towers: Path, retriever: Retriever, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(towers / "vectors", tmp_path / "vectors"))
    items = pq.read_table(towers / "data" / "items")
    texts = [f"another {text}" if text else text for text in items["text"].to_pylist()]
    index = items.column_names.index("text")
    edited = items.set_column(index, "text", pa.array(texts, items.schema.field("text").type))
    pq.write_table(edited, tmp_path / "items.parquet")

    assert add_items(copy / "queries", str(tmp_path / "items.parquet")).changed > 0

    user, history, _ = next(row for row in liked_rows(towers) if row[1]["history"])
    query = Retriever.load(copy).query(user, history)
    assert not np.array_equal(query, retriever.query(user, history))


def test_what_a_run_does_not_have_is_refused_and_leaves_nothing(
    towers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = towers / "none"
    with joined_ranks("cpu") as ranks:
        with pytest.raises(ValueError, match=str(towers / "vectors")):
            export_vectors(towers / "run", towers / "vectors", None, None, ranks)
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(
            ValueError, match=r"extra `retrieve` \(import of faiss.*recsys-em3\[retrieve\]"
        ):
            export_vectors(towers / "run", out, None, "hnsw", ranks)
    assert not out.exists() and not list(towers.glob(".none*"))


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indexes_find_nearly_all_that_a_flat_one_finds(kind: Any) -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((30, 16))
    near = centres[generator.integers(30, size=3000)] + 0.3 * generator.standard_normal((3000, 16))
    vectors = unit(near.astype(np.float32))
    exact = search_index(build_index(vectors, "flat"), vectors[:100], 10)[1]

    actual = search_index(build_index(vectors, kind), vectors[:100], 10)[1]

    shared = [len(np.intersect1d(*pair)) for pair in zip(exact, actual, strict=True)]
    assert np.mean(shared) / 10 > 0.95


@pytest.mark.parametrize("num_items", [50, 1000])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_of_few_items_finds_as_many_as_are_asked_for(
    kind: Any, num_items: int
) -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((num_items, 16)).astype(np.float32))
    exact = search_index(build_index(vectors, "flat"), vectors[:20], 100)[1]

    indices = search_index(build_index(vectors, kind), vectors[:20], 100)[1]

    assert indices.shape == (20, min(100, num_items)) and (indices >= 0).all()
    shared = [len(np.intersect1d(*pair)) for pair in zip(exact, indices, strict=True)]
    assert np.mean(shared) / indices.shape[1] > 0.99
