"""What a run refuses to begin from, with the fix; and that it begins with the fix."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recsys.checkpoint.schema_runs import rewrite
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    assert_equal,
    best_of,
    changed,
    start,
    state_of,
    stored_state,
    write_run,
)

FAULTS = [
    r"embeddings\.item\.weight \[40, 16\] -> \[40, 8\]",
    r"ranking\.\S+ \[\d+.*\] -> \[.* and \d+ more",
    r"--warm-start-skip .*'\*\.item\.\*' .*'ranking\.mlp\*'",
    r"'item': rowwise_adagrad before, adagrad now; .*optimizer false",
    r"dense optimizer: adamw.*sgd.*optimizer false",
    r"'rankin\.\*': no parameter",
    r"'ranking\.none': no parameter",
    r"'shop': had 5 rows, num_embeddings is 4",
]


@pytest.fixture(scope="module")
def refusal(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The error of a start in which nothing fits."""
    folder = tmp_path_factory.mktemp("refusal")
    data = changed(plain, folder, lambda schema: schema["columns"]["shop"].update(num_embeddings=4))
    argv = ["--embedding.dim", "8", "--embedding.optimizer", "adagrad", "--optimizer.name", "sgd"]
    request = {"only": ("*", "ranking.none"), "skip": ("rankin.*",)}
    with (
        pytest.raises(ValueError, match="cannot start") as refused,
        start(plain, folder / "new", *WITHOUT_CONTENT, *argv, data=data, **request),
    ):
        pass
    assert not (folder / "new").exists()
    return str(refused.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_with_the_fix_before_anything_is_written(
    refusal: str, fault: str
) -> None:
    assert re.search(fault, refusal), refusal


def test_with_the_fixes_it_starts(plain: Path, tmp_path: Path) -> None:
    argv = ["--embedding.optimizer", "adagrad", "--ranking.mlp_units", "[8]"]
    request: dict[str, Any] = {"skip": ("ranking.*",), "optimizer": False}
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, *argv, **request) as new:
        assert re.search(r"ranking\.mlp\S+ +not asked for", new.text)
        assert re.search(r"setting ranking\.mlp_units", new.text)


def test_a_table_that_is_frozen_now_keeps_its_weights_alone(plain: Path, tmp_path: Path) -> None:
    argv = ["--embedding.tables", "{item: {frozen: true}}"]
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, *argv) as new:
        assert re.search("'item' +rowwise_adagrad before, none now +begins anew", new.text)
        assert_equal(state_of(new.job), stored_state(best_of(plain)), "item")


def price_for_weight(schema: dict[str, Any]) -> None:
    """Drops the first dense column and adds one, so that `age` takes its place."""
    del schema["columns"]["price"]
    schema["columns"]["weight"] = {"kind": "dense"}


def without_first_label(schema: dict[str, Any]) -> None:
    """Drops the first label, so that the second takes its place."""
    del schema["columns"]["liked"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (price_for_weight, r"dense columns: .*\['price', 'age', .* \['age', .*'weight'\]"),
        (without_first_label, r"labels: .*\['liked', 'bought'\].*\['bought'\]"),
    ],
)
def test_inputs_and_labels_at_the_places_of_others_are_refused_and_begin_anew_with_the_fix(
    plain: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], name: str
) -> None:
    data = changed(plain, tmp_path, change)
    for split in ("train", "valid", "test"):
        rewrite(data / split, lambda table: table.append_column("weight", table["price"]))
    arguments: dict[str, Any] = {"data": data}
    with (
        pytest.raises(ValueError, match=f"{name}.*skip 'ranking\\.\\*'"),
        start(plain, tmp_path / "new", *WITHOUT_CONTENT, **arguments),
    ):
        pass
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, **arguments, skip=("ranking.*",)) as new:
        assert re.search("ranking\\..* not asked for", new.text)


def test_a_tower_over_other_columns_of_the_user_is_refused(tmp_path: Path) -> None:
    argv = [*WITHOUT_CONTENT, "--epochs", "1", "--best_model_by", "auc", "--ranking"]
    tower = "{name: two_tower, query_features: [%s]}"
    folder = write_run(tmp_path / "towers", *argv, tower % "price")
    with (
        pytest.raises(ValueError, match=r"columns of the user: .*'price'\], are \['user', 'age'\]"),
        start(folder, tmp_path / "new", *argv, tower % "age"),
    ):
        pass


def other_encoder(run: Path) -> None:
    stored = json.loads((run / "encoders.json").read_text())
    stored["text"]["weights"] = "0" * 32
    (run / "encoders.json").write_text(json.dumps(stored))


def test_other_frozen_weights_are_refused(multimodal: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(multimodal / "run", run)
    other_encoder(run)
    with (
        pytest.raises(ValueError, match=r"content\.modalities\.text.*skip 'content\.\*\.text"),
        start(multimodal, tmp_path / "new", run=run),
    ):
        pass
    with start(multimodal, tmp_path / "new", run=run, skip=("content.*.text.*",)) as new:
        assert re.search(r"memory bank +.*encoders +all items", new.text)


def test_terms_of_other_embeddings_are_refused(tmp_path: Path) -> None:
    def words(num_embeddings: int) -> list[str]:
        modality = f"{{kind: terms, column: text, num_embeddings: {num_embeddings}}}"
        return ["--epochs", "1", "--content.modalities", f"{{words: {modality}}}"]

    folder = write_run(tmp_path / "terms", *words(64))
    message = r"content\.modalities\.words: num_embeddings was 64, is 65.*skip 'content\.\*\.words"
    with pytest.raises(ValueError, match=message), start(folder, tmp_path / "new", *words(65)):
        pass
    skip = ("content.*.words.*",)
    with start(folder, tmp_path / "new", *words(65), skip=skip) as new:
        assert re.search(r"content\.projections\.words.* not asked for", new.text)


def without_best(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "best")


def damaged(run: Path) -> None:
    (file,) = (run / "checkpoints" / "best").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (shutil.rmtree, "no best checkpoint"),
        (without_best, r"no best checkpoint; give --warm-start-checkpoint last"),
        (damaged, r"\.distcp"),
        (lambda run: (run / "schema.yaml").write_text("x: 1"), r"schema\.yaml"),
        (lambda run: (run / "vocabulary" / "item.parquet").unlink(), r"item\.parquet"),
    ],
)
def test_a_run_that_cannot_be_started_from_is_refused(
    plain: Path, tmp_path: Path, change: Callable[[Path], object], line: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain / "run", run)
    change(run)
    with (
        pytest.raises(ValueError, match=line),
        start(plain, tmp_path / "new", *WITHOUT_CONTENT, run=run),
    ):
        pass
