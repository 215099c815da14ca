"""Scores of a package are those of `predict`, with several histories too."""

import shutil
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import score, split_interactions
from recsys.evaluation.predict import load_run, predict
from recsys.serving import Scorer, export
from recsys.serving import scorer as scorer_module
from recsys.serving.export import export_run
from recsys.serving.package import GRAPH, MANIFEST, read_manifest, write_manifest
from recsys.serving.retrieval import Retriever
from recsys.serving.retrieval.item_vectors import export_vectors
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.recsys.serving.serving_runs import HISTORY_COLUMNS, exported, requests
from tests.recsys.test_docstring_examples import run_example
from tests.several_histories import write_several_histories

Run = tuple[Path, Path, np.ndarray]  # folder of dataset and run, package, predictions


@pytest.fixture(scope="module")
def scorer(package_run: Run) -> Scorer:
    return Scorer.load(package_run[1])


def test_scores_equal_those_of_predict(package_run: Run, scorer: Scorer) -> None:
    scores = [scorer.score(**request) for request in requests(package_run[0] / "data")]

    np.testing.assert_allclose(np.concatenate(scores), package_run[2], rtol=0, atol=1e-6)


def test_threads_share_a_scorer(package_run: Run, scorer: Scorer) -> None:
    rows = list(requests(package_run[0] / "data"))
    scores: dict[int, np.ndarray] = {}

    def score_request(number: int) -> None:
        scores[number] = np.concatenate([scorer.score(**request) for request in rows])

    threads = [threading.Thread(target=score_request, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number in range(4):
        np.testing.assert_allclose(scores[number], package_run[2], rtol=0, atol=1e-6)


def test_smaller_tables_change_scores_little(
    package_run: Run, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_graph(*arguments: Any) -> None:  # it does not depend on the tables' type
        shutil.copy(package_run[1] / GRAPH, arguments[-1])

    monkeypatch.setattr(export, "_write_graph", copy_graph)
    package = tmp_path / "package_int8"
    with joined_ranks("cpu") as ranks:
        export_run(package_run[0] / "run", package, "int8", ranks)
    small = Scorer.load(package, previous=scorer)

    scores = [small.score(**request) for request in requests(package_run[0] / "data")]

    np.testing.assert_allclose(np.concatenate(scores), package_run[2], rtol=0, atol=0.02)


def test_products_in_bfloat16_change_scores_little(package_run: Run, tmp_path: Path) -> None:
    package = tmp_path / "package_bf16"
    with joined_ranks("cpu") as ranks:
        export_run(package_run[0] / "run", package, "fp32", ranks, precision="bf16")
    rounded = Scorer.load(package)

    scores = [rounded.score(**request) for request in requests(package_run[0] / "data")]

    np.testing.assert_allclose(np.concatenate(scores), package_run[2], rtol=0, atol=0.02)
    assert rounded.manifest.precision == "bf16"
    assert not np.array_equal(np.concatenate(scores), package_run[2])


def test_a_number_that_no_model_can_take_is_refused_by_all(
    package_run: Run, scorer: Scorer, tmp_path: Path
) -> None:
    request = next(requests(package_run[0] / "data"))
    with pytest.raises(ValueError, match="value 0: value inf"):
        scorer.score(**request | {"user": request["user"] | {"price": 1e300}})
    with pytest.raises(ValueError, match="not finite"):
        scorer.score(**request | {"user": request["user"] | {"price": 3e38}})
    table = pq.read_table(package_run[0] / "data" / "test")
    price = pa.array([0.5, 3e38, *[0.5] * (table.num_rows - 2)], pa.float32())
    index, file = table.schema.get_field_index("price"), tmp_path / "far.parquet"
    pq.write_table(table.set_column(index, "price", price), file)
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=f"not finite.*{file} row 1"):
        predict(package_run[0] / "run", [str(file)], tmp_path / "out.parquet", None, ranks, "cpu")


def test_no_candidates_give_no_scores(package_run: Run, scorer: Scorer) -> None:
    request = next(requests(package_run[0] / "data"))

    assert scorer.score(request["user"], request["history"], []).shape == (0, 1)


def test_a_package_takes_over_the_equal_graph_of_the_one_before(
    package_run: Run, scorer: Scorer, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(package_run[1], tmp_path / "package"))
    table = package / "tables" / "item.vectors"
    table.write_bytes((2 * np.fromfile(table, np.float32)).tobytes())
    (package / MANIFEST).unlink()
    write_manifest(package, read_manifest(package_run[1], verify=False))
    request = next(requests(package_run[0] / "data"))

    following = Scorer.load(package, previous=scorer)

    assert following._graph is scorer._graph
    scores = following.score(**request)
    np.testing.assert_array_equal(scores, Scorer.load(package).score(**request))
    assert not np.array_equal(scores, scorer.score(**request))


def test_a_scorer_has_the_files_of_one_package_whatever_a_link_names_later(
    package_run: Run, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, link = Path(shutil.copytree(package_run[1], tmp_path / "later")), tmp_path / "newest"
    table = later / "tables" / "item.vectors"
    table.write_bytes((2 * np.fromfile(table, np.float32)).tobytes())
    link.symlink_to(package_run[1])

    def read_and_exchange(*arguments: Any) -> Any:
        manifest = read_manifest(*arguments)
        link.unlink()
        link.symlink_to(later)
        return manifest

    monkeypatch.setattr(scorer_module, "read_manifest", read_and_exchange)
    request = next(requests(package_run[0] / "data"))
    loaded = Scorer.load(link, previous=scorer)
    np.testing.assert_array_equal(loaded.score(**request), scorer.score(**request))


def test_other_versions_than_those_of_the_export_are_named(
    package_run: Run, scorer: Scorer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = Path(shutil.copytree(package_run[1], tmp_path / "package"))
    Scorer.load(package, previous=scorer)
    assert not caplog.messages
    (package / MANIFEST).unlink()
    manifest = read_manifest(package_run[1])
    write_manifest(package, replace(manifest, versions=manifest.versions | {"torch": "1.13.1"}))
    Scorer.load(package, previous=scorer)
    (line,) = caplog.messages
    assert "torch 1.13.1" in line and version("torch") in line


def test_the_example_in_the_docstring_runs(
    package_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(package_run[0])
    run_example(Scorer, {})


OTHER_HISTORIES = ("bought", "bought_shop", "bought_price", "searched")
COLUMNS = (*HISTORY_COLUMNS, "history_shop", *OTHER_HISTORIES)
FACTORS = {"price": 340.0, "history_liked": 50.0, "bought_price": 9e4}


def write_wide(folder: Path) -> Path:
    """Several histories with numbers of wide range in every column and list."""
    write_several_histories(folder)
    for file in folder.glob("[tv]*/*.parquet"):
        table = pq.read_table(file)
        for name, factor in FACTORS.items():
            column = table[name]
            values = [widened(value, factor) for value in column.to_pylist()]
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(values, column.type))
        pq.write_table(table, file)
    return folder


def widened(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [widened(number, factor) for number in value]
    return None if value is None else value * factor


def test_scores_of_a_package_equal_those_of_predict(tmp_path: Path) -> None:
    data = write_wide(tmp_path / "data")
    package, predicted = exported(tmp_path, backbone_config(tmp_path, "din_dcn", "none"))
    scorer = Scorer.load(package)
    scores = [scorer.score(**request) for request in requests(data, COLUMNS)]
    np.testing.assert_allclose(np.concatenate(scores), predicted, rtol=0, atol=1e-6)
    with joined_ranks("cpu") as ranks:
        scaling = load_run(tmp_path / "run", None, ranks, "cpu").em3.scaling
    assert scaling is not None and scaling.is_scaled.all()
    assert set(scaling.names) == set(FACTORS)


def test_queries_of_a_user_tower_are_those_of_the_model(tmp_path: Path) -> None:
    """It is given the dense columns of the user alone."""
    data = write_wide(tmp_path / "data")
    schema = data / "schema.yaml"
    weight = "columns:\n  weight: {kind: dense, column: price, transform: [log1p]}\n"
    schema.write_text(schema.read_text().replace("columns:\n", weight, 1))
    config = backbone_config(tmp_path, "two_tower", "none")
    config = replace(config, ranking=replace(config.ranking, query_features=["price"]))  # type: ignore[call-arg]
    exported(tmp_path, config)
    with joined_ranks("cpu") as ranks:
        job = load_run(tmp_path / "run", None, ranks, "cpu")
        samples = split_interactions(job, "test")
        expected = score(job, samples, with_queries=True)["queries"]
        export_vectors(tmp_path / "run", tmp_path / "vectors", None, "flat", ranks)
    tower = Retriever.load(tmp_path / "vectors").tower
    assert tower is not None
    liked = [row["liked"] > 0 for row in pq.read_table(data / "test").to_pylist()]
    rows = [request for request, is_liked in zip(requests(data, COLUMNS), liked) if is_liked]
    queries = [tower.query(request["user"], request["history"]) for request in rows]
    torch.testing.assert_close(torch.from_numpy(np.stack(queries)), expected, rtol=0, atol=1e-5)
