"""What is fitted to a partition is fitted after it was scored, by the model of those before it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recsys.build import Job
from recsys.checkpoint.partitions import ContinualFolder, newest_run
from recsys.checkpoint.run_schema import load_run_schema
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.data.prepare import prepare_transforms, prepare_vocabularies
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.evaluate import fill_bank, scores_report
from recsys.evaluation.predict import load_run, predict
from recsys.evaluation.scores import read_scores
from recsys.training.continual import partition_run
from recsys.training.continual.partition_run import score_partition
from recsys.training.train import train
from tests.recsys.checkpoint.warm_start.warm_runs import state_of, stored_state
from tests.recsys.training.changed_answers import set_column, shuffle_labels
from tests.recsys.training.continual.walk_runs import (
    ITEMS,
    NAMES,
    WITHOUT_CONTENT,
    config_of,
    lines_of,
    rewound,
    walk,
    write_partition,
    write_walk,
)

EXACT_USERS = {"kind": "id", "num_embeddings": 40, "vocabulary": {"kind": "exact"}}
DAYS = [name.removeprefix("date=") for name in NAMES]
VOTES = ["--neighbours", "{values: history_liked, dim: 4, taste_dim: 4}"]


def write_days(folder: Path, count: int = 2, **columns: dict[str, Any]) -> Path:
    """Write a walk whose users have a growing vocabulary: each day has some that are new in it."""
    write_walk(folder, count)
    schema = yaml.safe_load((folder / "schema.yaml").read_text())
    schema["columns"] |= {"user": EXACT_USERS, **columns}
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    for number in range(count):
        for file in sorted((folder / "train" / NAMES[number]).glob("*.parquet")):
            table = pq.read_table(file)
            users = table["user"].to_numpy() + 3 * number
            pq.write_table(set_column(table, "user", pa.array(users)), file, row_group_size=11)
    return folder


def logits_of(run: Path, number: int) -> np.ndarray:
    return read_scores(ContinualFolder(run).scores_of(NAMES[number])).logits


MEAN_ROWS = [f"--embedding.tables.{table}.new_rows=mean" for table in ("user", "item")]
CASES = {
    "votes": [*WITHOUT_CONTENT, *VOTES],
    "content": [*VOTES],
    "averages": [*VOTES, "--optimizer.ema_decay", "0.9", "--optimizer.ema_tables", "true"],
    "rows_of_mean": [*WITHOUT_CONTENT, *MEAN_ROWS],
}


# The case of averages reads all that the case of content reads.
PARAMS = [pytest.param(case, marks=[pytest.mark.long] * (case == "content")) for case in CASES]


@pytest.fixture(scope="module", params=PARAMS)
def three(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A walk over three days of a case, and its words."""
    folder, argv = tmp_path_factory.mktemp(request.param), CASES[request.param]
    write_days(folder / "data", 3)
    walk(folder, folder / "run", *argv)
    return folder, argv


def test_a_score_depends_on_no_label_and_on_no_other_row(
    three: tuple[Path, list[str]], tmp_path: Path
) -> None:
    walked, argv = three
    old_logits = logits_of(walked / "run", 2)
    unchanged = list(range(0, len(old_logits), 2))
    rewound(walked, tmp_path)
    shuffle_labels(tmp_path / "data" / "train" / NAMES[2], seed=1, unchanged=unchanged)
    walk(tmp_path, tmp_path / "run", *argv)
    assert np.array_equal(logits_of(tmp_path / "run", 2)[unchanged], old_logits[unchanged])


def assert_predicted_alike(
    folder: Path,
    number: int,
    out: Path,
    line: dict[str, Any] | None = None,
    base_run: Path | None = None,
) -> None:
    """The scores and metrics of a partition are those of `recsys predict` by the run before."""
    run, inputs = ContinualFolder(folder / "run"), folder / "data" / "train" / NAMES[number]
    with joined_ranks("cpu") as ranks:
        base_run = base_run or run.run_of(NAMES[number - 1])
        predict(base_run, [str(inputs)], out, str(folder / "data"), ranks, "cpu")
    scores = read_scores(run.scores_of(NAMES[number]))
    predicted = pq.read_table(out)["prediction_liked"].to_numpy().astype(np.float64)
    scores.logits[:, 0] = np.log(predicted) - np.log1p(-predicted)
    report = scores_report(scores, {})
    line = line or lines_of(folder / "run")[number - 1]
    for subset in ("warm", "cold", "unseen"):
        report |= {f"{subset} {name}": value for name, value in report[subset].items()}
        line |= {f"{subset} {name}": value for name, value in line[subset].items()}
    numbers = {name: value for name, value in report.items() if isinstance(value, float)}
    assert len(numbers) > 5
    assert {name: line[name] for name in numbers} == pytest.approx(numbers, abs=1e-6)


def test_the_metrics_of_a_partition_are_those_of_predictions_before_it(
    three: tuple[Path, list[str]], tmp_path: Path
) -> None:
    assert_predicted_alike(three[0], 2, tmp_path / "predicted.parquet")


# Of other backbones tests/recsys/test_schemas.py compares scores with predictions.
@pytest.mark.parametrize("argv", [["hstu", *VOTES], ["two_tower"]], ids=["hstu", "two_tower"])
def test_the_metrics_of_other_backbones_are_those_of_predictions_before(
    argv: list[str], tmp_path: Path
) -> None:
    write_days(tmp_path / "data")
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, "--ranking.name", *argv)
    assert_predicted_alike(tmp_path, 1, tmp_path / "predicted.parquet")


@pytest.mark.parametrize("case", [pytest.param("content", marks=pytest.mark.long), "averages"])
def test_the_first_partition_of_a_walk_is_scored_as_the_run_that_it_was_begun_from_predicts(
    case: str, tmp_path: Path
) -> None:
    """That run is one of `recsys train`: its best model is of an earlier step than its last."""
    data = write_days(tmp_path / "data", 2)
    old = tmp_path / "old"
    for split in ("train", "valid", "test"):
        shutil.copytree(data / "train" / NAMES[0], old / split)
    shutil.copytree(data / "items", old / "items")
    shutil.copy(data / "schema.yaml", old)
    prepare_vocabularies(str(old))
    shutil.copytree(old / "vocabulary", data / "vocabulary")
    with joined_ranks("cpu") as ranks:
        config = config_of(tmp_path, *CASES[case], "--epochs", "2", "--patience", "2")
        train(config, str(old), tmp_path / "trained", ranks)
    walk_from = WarmStart(tmp_path / "trained")
    walk(tmp_path, tmp_path / "run", *CASES[case], first=DAYS[1], warm_start=walk_from)
    (line,) = lines_of(tmp_path / "run")
    out = tmp_path / "predicted.parquet"
    assert_predicted_alike(tmp_path, 1, out, line, base_run=tmp_path / "trained")


def test_a_refreshed_bank_is_encoded_by_the_averaged_weights_that_score(tmp_path: Path) -> None:
    data = write_days(tmp_path / "data", 1)
    argv = [*CASES["averages"], "--content.history.refresh_bank_every_epoch", "true"]
    walk(tmp_path, tmp_path / "run", *argv)
    with joined_ranks("cpu") as ranks:
        run = ContinualFolder(tmp_path / "run").run_of(NAMES[0])
        job = load_run(run, str(data), ranks, "cpu")
        assert job.em3.content is not None and job.em3.content.bank is not None
        bank = job.em3.content.bank
        items = torch.arange(job.schema.num_items)
        stored = bank.lookup(items)[0].clone()
        fill_bank(job)
        torch.testing.assert_close(stored, bank.lookup(items)[0])


def test_new_items_in_a_table_that_grows_are_scored_by_the_rule_of_new_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_walk(tmp_path / "data", 1) / "schema.yaml"
    file.write_text(file.read_text().replace("num_embeddings: 40", "num_embeddings: 15"))
    tables: list[torch.Tensor] = []

    def watched(job: Job, *arguments: Any) -> Any:
        tables.append(state_of(job)["item"])
        return score_partition(job, *arguments)

    monkeypatch.setattr(partition_run, "score_partition", watched)
    averages = ["--optimizer.ema_decay", "0.9", "--optimizer.ema_tables", "true"]
    rule = "--embedding.tables.item.new_rows=zero"
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *averages, rule)
    write_partition(tmp_path / "data", 1)
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *averages, rule)
    (table,) = tables
    assert len(table) > ITEMS[1] > ITEMS[0] == 14
    assert table[:10].any() and not table[14 : ITEMS[1]].any()


def test_a_day_without_averages_goes_on_from_the_averaged_model_of_the_day_before(
    tmp_path: Path,
) -> None:
    write_days(tmp_path / "data", 2)
    argv = [*WITHOUT_CONTENT, "--optimizer.ema_decay"]
    walk(tmp_path, tmp_path / "run", *argv, "0.9", last=DAYS[0])
    walk(tmp_path, tmp_path / "run", *argv, "null")
    assert_predicted_alike(tmp_path, 1, tmp_path / "predicted.parquet")


def test_a_model_that_encodes_a_share_of_the_items_scores_by_the_bank_of_the_day_before(
    tmp_path: Path,
) -> None:
    write_days(tmp_path / "data", 2)
    walk(tmp_path, tmp_path / "run", "--content.encoder_share", "0.3")
    assert_predicted_alike(tmp_path, 1, tmp_path / "predicted.parquet")


@pytest.mark.parametrize("begins", ["anew", "warm"])
def test_transforms_are_fitted_on_the_first_partition_alone(begins: str, tmp_path: Path) -> None:
    """Values that the dataset has are of all partitions, those that lie ahead included."""
    scaled = {"kind": "dense", "column": "price", "transform": ["standardize"]}
    data = write_days(tmp_path / "data", 3, scaled=scaled)
    for number in range(3):
        for file in (data / "train" / NAMES[number]).glob("*.parquet"):
            table = pq.read_table(file)
            prices = table["price"].to_numpy() + number
            pq.write_table(set_column(table, "price", pa.array(prices)), file)
    prepare_transforms(str(data))
    if begins == "warm":
        walk(tmp_path, tmp_path / "old", *WITHOUT_CONTENT, last=DAYS[0])
        walk_from = WarmStart(newest_run(tmp_path / "old"))
        walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, first=DAYS[1], warm_start=walk_from)
    else:
        walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT)
    prices = pq.read_table(data / "train" / NAMES[0])["price"].to_numpy()
    for number in (1, 2):
        schema = load_run_schema(ContinualFolder(tmp_path / "run").run_of(NAMES[number]))
        assert schema is not None
        (step,) = schema.transforms["scaled"].steps
        assert step.settings["mean"] == pytest.approx(prices.mean())
    line = lines_of(tmp_path / "run")[-1]
    assert_predicted_alike(tmp_path, 2, tmp_path / "predicted.parquet", line)


def test_new_ids_begin_with_pretrained_vectors_behind_the_scores(tmp_path: Path) -> None:
    write_days(tmp_path / "data", 2)
    file, run = tmp_path / "vectors.parquet", tmp_path / "run" / "partitions" / NAMES[1]
    vectors = pa.array(np.full((60, 16), 7.0).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": np.arange(60), "vector": vectors}), file)
    table = f"{{init_from: {{path: {file}}}, frozen: true}}"
    tables = ["--embedding.tables", f"{{item: {table}, user: {table}}}"]
    walk(tmp_path, tmp_path / "run", *WITHOUT_CONTENT, *tables)
    assert_predicted_alike(tmp_path, 1, tmp_path / "predicted.parquet")
    state = stored_state(run / "checkpoints" / "best")
    for name in ("user", "item"):
        is_known = pq.read_table(run / "vocabulary" / f"{name}.parquet").num_rows
        assert (state[name][:is_known] == 7).all() and not (state[name][is_known:] == 7).any()
