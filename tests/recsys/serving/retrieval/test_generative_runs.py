"""Runs of generative retrieval: trained on ranks, evaluated, packaged, and asked for items."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.warm_start.source import WarmStart
from recsys.cli import main
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.predict import evaluate, load_run, predict
from recsys.evaluation.retrieval import catalogue_of, retrieval_metrics
from recsys.ranking.generative import Generative
from recsys.serving import Scorer
from recsys.serving.export import export_run
from recsys.serving.retrieval import Retriever
from recsys.serving.retrieval.item_vectors import export_vectors
from recsys.serving.retrieval.semantic_ids import export_semantic_ids
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import assert_same_metrics
from tests.recsys.em3_runs import STEPS, full_table, ranks_of, train_configs
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.serving.retrieval.retrieval_runs import NUM_ITEMS, liked_rows

pytest.importorskip("faiss")
SIZES: dict[str, Any] = {"code_levels": 2, "num_codes": 16, "beam_size": NUM_ITEMS}


def generative_config(folder: Path, **settings: Any) -> Any:
    config = backbone_config(folder, "generative", "concat", batch_size=9, epochs=1)
    ranking = replace(config.ranking, mlp_units=[32], sequence_dim=16, **SIZES, **settings)
    return replace(config, ranking=ranking)


def train_on_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    ranks = ranks_of(rank, world_size)
    config = generative_config(folder, semantic_ids=str(folder / "ids"), exclude_seen=True)
    metrics = train(config, str(folder / "data"), folder / "run", ranks)
    assert_same_metrics(evaluate(folder / "run", None, "test", ranks, "cpu"), metrics["test"])
    return metrics["test"]


@pytest.fixture(scope="module")
def folder(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, semantic ids of two_tower's content, and a run on two ranks with its report."""
    folder = tmp_path_factory.mktemp("generative")
    (folder / "data").symlink_to(towers / "data")
    with joined_ranks("cpu") as ranks:
        export_semantic_ids(towers / "run", folder / "ids", 2, 16, ranks, balanced=True)
    reports = run_on_ranks(train_on_rank, 2, folder)
    assert reports[0]["retrieval"] == reports[1]["retrieval"]
    (folder / "report.json").write_text(json.dumps(reports[0]["retrieval"]))
    return folder


@pytest.fixture(scope="module")
def retriever(folder: Path) -> Retriever:
    with joined_ranks("cpu") as ranks:
        export_vectors(folder / "run", folder / "vectors", None, None, ranks)
    return Retriever.load(folder / "vectors")


@pytest.fixture(scope="module")
def package(folder: Path) -> Scorer:
    with joined_ranks("cpu") as ranks:
        export_run(folder / "run", folder / "package", "fp32", ranks)
    return Scorer.load(folder / "package")


def test_a_run_has_the_codes_of_its_semantic_ids(folder: Path) -> None:
    with joined_ranks("cpu") as ranks:
        job = load_run(folder / "run", None, ranks, "cpu")
        assert isinstance(job.em3.ranking, Generative)
        table, rows = job.em3.ranking.table, job.schema.vocabularies["item"]
        coded = pq.read_table(folder / "ids" / "items.parquet")
        indices = torch.from_numpy(rows.rows_of(coded["item"].combine_chunks()))
        expected = torch.tensor(coded["semantic_ids"].to_pylist()) - torch.tensor([0, 16])
        assert torch.equal(table[indices][:, :2], expected)
        assert len(table[indices][:, :3].unique(dim=0)) == NUM_ITEMS - 1 == len(indices)
        is_other = torch.ones(len(table), dtype=torch.bool).index_fill(0, indices, False)
        assert is_other.any() and (table[is_other] == -1).all()


def test_a_warm_start_with_other_codes_is_refused(
    folder: Path, towers: Path, tmp_path: Path
) -> None:
    data, start = str(folder / "data"), WarmStart(folder / "run")
    with joined_ranks("cpu") as ranks:
        config = generative_config(folder, semantic_ids=str(folder / "ids"))
        train(config, data, tmp_path / "same", ranks, warm_start=start)
        export_semantic_ids(towers / "run", tmp_path / "ids", 2, 16, ranks)
        config = generative_config(folder, semantic_ids=str(tmp_path / "ids"))
        first, second = (
            pq.read_table(path / "ids" / "items.parquet")["semantic_ids"].to_pylist()
            for path in (folder, tmp_path)
        )
        changes = sum(before != after for before, after in zip(first, second, strict=True))
        assert 0 < changes < len(first) == 129
        with pytest.raises(ValueError, match=rf"{changes} of 129 items have other codes"):
            train(config, data, tmp_path / "other", ranks, warm_start=start)


def test_the_evaluation_has_the_places_of_brute_force(folder: Path) -> None:
    """Each query scores all items, of which those of its history are left out."""
    with joined_ranks("cpu") as ranks:
        job = load_run(folder / "run", None, ranks, "cpu")
        scored = score(job, split_interactions(job, "test"), with_queries=True)
        model, items = job.em3.ranking.eval(), np.asarray(catalogue_of(job))
        assert isinstance(model, Generative)
        above, ends = [], scored["query_seen_lengths"].cumsum(0)
        for row, target in enumerate(scored["query_items"].tolist()):
            table = model.table[torch.from_numpy(items)]
            states = scored["queries"][row].expand(len(items), -1)
            with torch.no_grad():
                scores = model.decoder(states, table).numpy()
            first = int(ends[row] - scored["query_seen_lengths"][row])
            is_seen = np.isin(items, scored["query_seen"][first : int(ends[row])]) & (
                items != target
            )
            score_of_target = scores[items == target]
            num_above = (
                (scores[~is_seen] > score_of_target).sum() if len(score_of_target) else len(items)
            )
            above.append(int(num_above))
    expected = retrieval_metrics(torch.tensor(above), torch.zeros(len(above)), depths=[10, 50])
    report = json.loads((folder / "report.json").read_text())
    assert report["catalogue"] == NUM_ITEMS - 1
    assert_same_metrics({name: report[name] for name in expected}, expected)
    assert 0 < report["recall@10"] < report["recall@50"] < 1


def test_a_package_scores_as_predict_does(folder: Path, package: Scorer) -> None:
    out = folder / "predictions.parquet"
    with joined_ranks("cpu") as ranks:
        predict(folder / "run", [str(folder / "data" / "test")], out, None, ranks, "cpu")
    expected = pq.read_table(out)["prediction_liked"].to_numpy()
    rows = pq.read_table(folder / "data" / "test")
    scores = [
        package.score(
            {name: row[name] for name in ("user", "price", "genres")},
            {name: row[name] for name in ("history", "history_liked")},
            [row["item"]],
        )[0, 0]
        for row in rows.to_pylist()
    ]
    np.testing.assert_allclose(np.log(scores), np.log(expected), rtol=0, atol=1e-4)
    assert len(np.unique(expected)) > 30


def test_items_are_retrieved_in_the_order_of_a_package_s_scores(
    folder: Path, retriever: Retriever, package: Scorer
) -> None:
    user, history, _ = next(row for row in liked_rows(folder) if row[1]["history"])
    result = retriever.retrieve(user, history, NUM_ITEMS)
    assert len(set(result.items)) == NUM_ITEMS - 1
    scores = package.score(user | {"genres": []}, history, result.items)[:, 0]
    scores = np.log(scores) - np.log1p(-scores)
    np.testing.assert_allclose(result.scores, scores, atol=1e-4)
    assert retriever.retrieve(user, history, 3, exclude=result.items[:2]).items == result.items[2:5]


def test_a_search_of_codes_needs_no_faiss(
    folder: Path, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, history, _ = next(iter(liked_rows(folder)))
    expected = retriever.retrieve(user, history, 3).items
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    assert Retriever.load(retriever.folder).retrieve(user, history, 3).items == expected


def test_items_added_later_are_found_at_once(
    folder: Path, towers: Path, retriever: Retriever, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Path(shutil.copytree(towers / "data", folder / "later"))
    file = later / "items" / "part-0.parquet"
    rows = pq.read_table(file)
    new = rows.slice(0, 1).set_column(0, "item", pa.array(["item 3"]))
    pq.write_table(pa.concat_tables([rows, new]), file)
    with joined_ranks("cpu") as ranks:
        run, ids = towers / "run", folder / "ids"
        export_semantic_ids(run, folder / "ids_later", 3, 256, ranks, str(later), ids)
        export_semantic_ids(run, folder / "other_ids", 2, 9, ranks)
    retriever = Retriever.load(retriever.folder)  # that the others' does not change
    user, history, _ = next(row for row in liked_rows(folder) if row[1]["history"])
    old_result = retriever.retrieve(user, history, NUM_ITEMS)
    assert "item 3" not in old_result.items

    assert retriever.add_items(folder / "ids_later") == 1

    new_result = retriever.retrieve(user, history, NUM_ITEMS + 1)
    assert set(new_result.items) == {*old_result.items, "item 3"}
    assert (np.diff(new_result.scores) <= 0).all()
    duplicate = rows["item"][0].as_py()  # of equal content: the last code alone tells them apart
    scores = [dict(zip(result.items, result.scores)) for result in (old_result, new_result)]
    changed = [item for item in old_result.items if scores[1][item] != scores[0][item]]
    assert duplicate in changed and len(changed) < 10
    with pytest.raises(ValueError, match="its codes are not those of"):
        retriever.add_items(folder / "other_ids")
    argv = ["--package", str(folder / "vectors"), "--top_k", str(NUM_ITEMS)]
    argv += ["--input", str(folder / "vectors" / "queries" / "request.json")]
    assert main(["retrieve", *argv, "--new_items", str(folder / "ids_later")]) == 0
    assert "item 3" in json.loads(capsys.readouterr().out.splitlines()[-1])["items"]


def test_codes_of_new_items_alone_are_refused_as_they_may_be_of_other_codebooks(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_items = pa.array(["new item"]), np.array([[20, 3]])
    monkeypatch.setattr("recsys.serving.retrieval.retriever.read_codes", lambda *_: new_items)
    with pytest.raises(ValueError, match="or of none of its items"):
        retriever.add_items("codes")


def test_what_only_other_models_have_is_refused(
    folder: Path, towers: Path, retriever: Retriever
) -> None:
    with joined_ranks("cpu") as ranks:
        for run, kind, index in (
            (folder / "run", None, "flat"),
            (folder / "run", "item_tower", None),
            (towers / "run", "codes", None),
        ):
            with pytest.raises(ValueError, match="--vectors"):
                export_vectors(run, folder / "none", kind, index, ranks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="added by their codes"):
        Retriever.load(towers / "vectors").add_items(folder / "ids")


def steps_of(rank: int, world_size: int, folder: Path) -> Any:
    config = generative_config(folder, dropout=0.0)  # which is drawn on each rank
    return train_configs(rank, world_size, folder, {"generative": config})["generative"]


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    pair = run_on_ranks(steps_of, 2, tmp_path)
    (single,) = run_on_ranks(steps_of, 1, tmp_path)
    for step in range(STEPS):
        logits = torch.cat([run.logits[step] for run in pair])
        torch.testing.assert_close(logits, single.logits[step], atol=1e-5, rtol=1e-5)
        expected = {
            name: gradient
            for name, gradient in single.gradients[step].items()
            if name.startswith("ranking.")
        }
        gradients = {name: pair[0].gradients[step][name] for name in expected}
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
        assert expected["ranking.decoder.codes"].any()
    for table in ("item", "user"):
        tables = full_table(pair, STEPS, table), full_table([single], STEPS, table)
        torch.testing.assert_close(*tables, atol=1e-5, rtol=1e-4)
