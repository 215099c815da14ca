"""Similar items share codes, which stay when items are added, and any model takes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.checkpoint.reader import stored_tables
from recsys.cli import main
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.serving import Scorer
from recsys.serving.export import export_run
from recsys.serving.retrieval import semantic_ids
from recsys.serving.retrieval.catalogue import unit
from recsys.serving.retrieval.item_vectors import export_vectors
from recsys.serving.retrieval.semantic_ids import (
    Codebooks,
    collision_report,
    export_semantic_ids,
    load_codebooks,
    write_dataset_with,
)
from recsys.storage.location import Location
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.ranking.backbone_runs import backbone_config

pytest.importorskip("faiss")


def test_codes_are_the_nearest_centres_of_what_earlier_levels_leave() -> None:
    centres = np.array([[[1, 0], [0, 1]], [[0.2, 0], [0, -0.2]]], np.float32)
    vectors = np.array([[1, 0.01], [5, 1.2], [0.3, 4], [-0.1, 1]], np.float32)

    books = Codebooks(centres, np.zeros((2, 2)))
    codes = books.codes_of(vectors)

    residuals = unit(vectors)
    for level in range(2):
        distances = np.linalg.norm(residuals[:, None] - centres[level][None], axis=2)
        assert codes[:, level].tolist() == distances.argmin(axis=1).tolist()
        residuals = residuals - centres[level][codes[:, level]]
    assert (
        Codebooks(centres, np.zeros((2, 2))).ids_of(vectors).tolist()
        == (codes + np.array([0, 2])).tolist()
    )
    assert len(np.unique(codes, axis=0)) > 2


def test_each_level_leaves_less_of_the_vectors() -> None:
    vectors = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    books = Codebooks.fit(vectors, levels=3, codes=8)

    residuals, energy = unit(vectors), [1.0]
    for level, codes in enumerate(books.codes_of(vectors).T):
        residuals = residuals - books.centres[level][codes]
        energy.append(float((residuals**2).sum(axis=1).mean()))
    assert energy[1] < 0.6 and energy[2] < 0.8 * energy[1] and energy[3] < 0.8 * energy[2]
    assert books.codes_of(vectors[7:8]).tolist() == books.codes_of(vectors)[7:8].tolist()
    with pytest.raises(ValueError, match="--codes is 401"):
        Codebooks.fit(vectors, levels=1, codes=401)


def test_balanced_codes_are_used_alike_and_keep_most_of_the_vectors() -> None:
    random = np.random.default_rng(0)
    crowd = random.standard_normal((1, 6)) + 0.1 * random.standard_normal((300, 6))
    vectors = np.concatenate([crowd, random.standard_normal((100, 6))]).astype(np.float32)
    usage, energy = {}, {}
    for balanced in (False, True):
        books = Codebooks.fit(vectors, levels=2, codes=8, balanced=balanced)
        codes = books.codes_of(vectors)
        usage[balanced] = np.bincount(codes[:, 0], minlength=8)
        residuals = unit(vectors)
        for level in range(2):
            residuals = residuals - books.centres[level][codes[:, level]]
        energy[balanced] = float((residuals**2).sum(axis=1).mean())
    assert usage[False].max() > 120 and usage[True].max() < 75 and usage[True].min() > 25
    assert energy[True] < 0.35
    assert books.codes_of(vectors[5:6]).tolist() == codes[5:6].tolist()


def test_the_report_counts_items_that_share_all_codes() -> None:
    codes = np.array([[0, 1], [0, 1], [0, 2], [3, 1], [0, 1], [3, 1]])

    report = collision_report(codes, ["a", "b", "c", "d", "e", "f"], num_codes=4)

    assert (report["items"], report["distinct"], report["colliding"]) == (6, 3, 5)
    assert (report["largest"], report["largest_items"]) == (3, ["a", "b", "e"])
    assert [level["used"] for level in report["levels"]] == [2, 2]
    share = np.array([4, 2]) / 6
    assert report["levels"][0]["perplexity"] == pytest.approx(np.exp(-share @ np.log(share)))


@pytest.fixture(scope="module")
def semantic(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `ids` of the run's items, and the dataset with them."""
    folder = tmp_path_factory.mktemp("semantic")
    argv = ["--run", str(towers / "run"), "--out", str(folder / "ids"), "--levels", "2"]
    argv += ["--codes", "5", "--dataset", str(folder / "data"), "--log_level", "warning"]
    assert main(["semantic-ids", *argv]) == 0
    return folder


def test_any_model_takes_them_as_sparse_features(towers: Path, semantic: Path) -> None:
    ids = pq.read_table(semantic / "ids" / "items.parquet")
    ids_by_item = dict(zip(ids["item"].to_pylist(), ids["semantic_ids"].to_pylist(), strict=True))
    rows = pq.read_table(semantic / "data" / "train")
    assert rows["semantic_ids"].to_pylist() == [
        ids_by_item.get(item, []) for item in rows["item"].to_pylist()
    ]
    assert {len(item_ids) for item_ids in ids_by_item.values()} == {2}
    assert rows.drop_columns("semantic_ids").equals(pq.read_table(towers / "data" / "train"))

    with joined_ranks("cpu") as ranks:
        config = backbone_config(semantic, "dlrm", "none", epochs=1)
        train(config, str(semantic / "data"), semantic / "run", ranks)

    table = stored_tables(semantic / "run" / "checkpoints" / "best")["semantic_ids"]
    assert table.size[0] == 10
    with joined_ranks("cpu") as ranks:
        export_run(semantic / "run", semantic / "package", "fp32", ranks)
    scorer = Scorer.load(semantic / "package")
    request = json.loads((semantic / "package" / "request.json").read_text())
    items = list(ids_by_item)[:9]
    stated = {"item": items, "semantic_ids": [ids_by_item[item] for item in items]}
    assert "semantic_ids" not in json.dumps(request)  # the item says them
    assert np.array_equal(
        scorer.score(**{**request, "candidates": items}),
        scorer.score(**{**request, "candidates": stated}),
    )

    report = json.loads((semantic / "ids" / "collisions.json").read_text())
    codes = np.unique(np.array(list(ids_by_item.values())), axis=0)
    assert report["distinct"] == len(codes) <= 25 and report["items"] == len(ids_by_item)


def test_files_of_partitions_stay_apart(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 8, "valid": 4, "test": 4})
    rows = pq.read_table(data / "train")
    shutil.rmtree(data / "train")
    for day in range(2):
        folder = data / "train" / f"day={day}"
        folder.mkdir(parents=True)
        pq.write_table(rows.slice(4 * day, 4), folder / "part-0.parquet")
    (data / "train" / "day=0" / "_SUCCESS").touch()  # the other day is not whole
    root = Location.of(str(data))
    ids = pa.table({"item": list(range(30)), "codes": [[item % 5] for item in range(30)]})

    write_dataset_with(root, load_schema(root), ids, "codes", 5, tmp_path / "coded")

    files = [tmp_path / "coded" / "train" / f"day={day}" / "part-0.parquet" for day in range(2)]
    table = pa.concat_tables([pq.ParquetFile(file).read() for file in files])
    assert table["codes"].to_pylist() == [[item % 5] for item in rows["item"].to_pylist()]
    assert [file.with_name("_SUCCESS").exists() for file in files] == [True, False]


def test_codes_are_looked_up_beside_the_last_values_of_an_item(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 8, "valid": 4, "test": 4})
    schema = yaml.safe_load((data / "schema.yaml").read_text())
    schema["columns"]["price"] = {"kind": "dense", "fill": 0}
    schema["features"] = [{"by": ["item"], "columns": ["price"]}]
    (data / "schema.yaml").write_text(yaml.safe_dump(schema))
    folder = data / "features" / "item"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"item": [2, 7], "price": [0.5, 1.5]}), folder / "part-3.parquet")
    (data / ".state").mkdir()
    root = Location.of(str(data))
    ids = pa.table({"item": [1, 2], "codes": [[4], [0]]})

    write_dataset_with(root, load_schema(root), ids, "codes", 5, tmp_path / "coded")

    assert load_schema(Location.of(str(tmp_path / "coded"))).is_of_items("codes")
    values = pq.read_table(tmp_path / "coded" / "features" / "item")
    assert values.to_pylist() == [
        {"item": 2, "price": 0.5, "codes": [0]},
        {"item": 7, "price": 1.5, "codes": None},
        {"item": 1, "price": None, "codes": [4]},
    ]
    assert pq.read_table(folder).num_columns == 2 and not (tmp_path / "coded" / ".state").exists()


def test_no_user_tower_reads_the_codes_of_the_ranked_item(semantic: Path) -> None:
    config = backbone_config(semantic, "two_tower", "none", epochs=1)
    config.ranking.query_features = ["semantic_ids"]
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match="recall would be far"):
        train(config, str(semantic / "data"), semantic / "leaking", ranks)


def test_items_added_later_leave_the_codes_of_others(towers: Path, semantic: Path) -> None:
    later = Path(shutil.copytree(towers / "data", semantic / "later"))
    file = later / "items" / "part-0.parquet"
    rows = pq.read_table(file)
    new = rows.slice(0, 1).set_column(0, "item", pa.array(["item 3"]))
    pq.write_table(pa.concat_tables([new, rows]), file)

    with joined_ranks("cpu") as ranks:
        folder, run = semantic / "with_new", towers / "run"
        export_semantic_ids(run, folder, 3, 256, ranks, str(later), semantic / "ids")

    old_codes, new_codes = (
        dict(zip(*pq.read_table(location / "items.parquet").to_pydict().values(), strict=True))
        for location in (semantic / "ids", folder)
    )
    assert len(new_codes) == len(old_codes) + 1
    assert {item: new_codes[item] for item in old_codes} == old_codes
    assert new_codes["item 3"] == new_codes[rows["item"][0].as_py()]  # equal content
    assert np.array_equal(load_codebooks(folder).centres, load_codebooks(semantic / "ids").centres)


def test_what_cannot_be_written_is_refused_before_items_are_encoded(
    towers: Path, semantic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_called(*arguments: object) -> None:
        raise AssertionError("items were encoded")

    monkeypatch.setattr(semantic_ids, "item_vectors", not_called)
    run, out = towers / "run", tmp_path / "ids"
    with joined_ranks("cpu") as ranks:
        with pytest.raises(ValueError, match="--codes is 9999"):
            export_semantic_ids(run, out, 2, 9999, ranks)
        with pytest.raises(ValueError, match=r"schema\.yaml: has a column 'semantic_ids'"):
            data = str(semantic / "data")
            export_semantic_ids(run, out, 2, 5, ranks, data, dataset=tmp_path / "data")
    assert not out.exists()


def test_codes_of_the_item_tower_are_of_its_vectors(towers: Path, tmp_path: Path) -> None:
    run, folders = towers / "run", [tmp_path / "ids", tmp_path / "again"]
    with joined_ranks("cpu") as ranks:
        export_semantic_ids(run, folders[0], 2, 5, ranks, vectors="item_tower")
        export_semantic_ids(run, folders[1], 2, 5, ranks, codebooks=folders[0])
        export_vectors(run, tmp_path / "vectors", "item_tower", None, ranks)
    expected = load_codebooks(folders[0]).ids_of(np.load(tmp_path / "vectors" / "vectors.npy"))
    assert len(np.unique(expected, axis=0)) > 5
    for folder in folders:  # codebooks keep the kind of vectors
        table = pq.read_table(folder / "items.parquet")
        assert table["semantic_ids"].to_pylist() == expected.tolist()


def test_a_ranking_model_has_no_vectors_of_an_item_tower(trained: Any, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match="give a run of two_tower"):
        export_semantic_ids(trained.run, tmp_path / "ids", 2, 5, ranks, vectors="item_tower")
    assert not (tmp_path / "ids").exists()


def test_codebooks_of_another_model_are_refused(semantic: Path) -> None:
    with pytest.raises(ValueError, match=str(semantic / "ids")):
        load_codebooks(semantic / "ids", "another model")
