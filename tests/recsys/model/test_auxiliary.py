"""Auxiliary losses: distillation by hand and in runs, and a loss of one's own from a file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.build import build_job
from recsys.config import AuxiliarySettings, Config, load_config
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.model.auxiliary import AuxiliaryInputs, Distillation, build_auxiliary
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, page_code, run_recsys, train_argv

LOGITS = torch.tensor([[0.5], [-1.0], [2.0], [0.0]])
TEACHER = torch.tensor([1.0, -2.0, math.nan, 9.0])
ROW_WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last row pads


class FakeBatch:
    rows = SimpleNamespace(loss_weights=ROW_WEIGHTS)


def distilled(loss: nn.Module, logits: Tensor = LOGITS) -> Tensor:
    columns = {"teacher": TEACHER}
    inputs: Any = AuxiliaryInputs(logits, None, None, FakeBatch(), columns)  # type: ignore[arg-type]
    result: Tensor = loss(inputs)
    return result


def test_distillation_is_cross_entropy_with_the_teacher_of_rows_that_have_one() -> None:
    expected = 0.0
    for logit, teacher in [(0.5, 1.0), (-1.0, -2.0)]:
        target, chance = 1 / (1 + math.exp(-teacher / 2)), 1 / (1 + math.exp(-logit / 2))
        expected -= target * math.log(chance) + (1 - target) * math.log(1 - chance)
    loss = Distillation("teacher", temperature=2.0)
    assert float(distilled(loss)) == pytest.approx(expected * 2.0**2 / 4, rel=1e-6)


def test_divergence_has_the_same_gradient_and_is_zero_where_both_agree() -> None:
    gradients = []
    for kind in ("bce", "kl"):
        logits = LOGITS.clone().requires_grad_()
        distilled(Distillation("teacher", kind), logits).backward()  # type: ignore[arg-type]
        assert logits.grad is not None
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0][2:].tolist() == [[0.0], [0.0]]
    agreed = TEACHER.nan_to_num(0.0)[:, None]
    assert float(distilled(Distillation("teacher", "kl"), agreed)) == pytest.approx(0, abs=1e-7)


def with_teacher(folder: Path) -> Path:
    """The small dataset with a teacher's logits, of every second row."""
    data = write_dataset(folder / "data")
    schema = data / "schema.yaml"
    schema.write_text(schema.read_text().replace("  liked:", "  teacher: {kind: extra}\n  liked:"))
    for path in data.glob("*/*.parquet"):
        if path.parent.name != "items":
            table = pq.read_table(path)
            logits = [
                2.0 * float(x) - 1 if n % 2 else None
                for n, x in enumerate(table["liked"].to_pylist())
            ]
            column = pa.array(logits, pa.float32())
            pq.write_table(table.append_column("teacher", column), path, row_group_size=11)
    return data


def config_of(folder: Path, auxiliary: dict[str, AuxiliarySettings]) -> Config:
    config = load_config(TINY, ["--content", "none", "--device", "cpu"])
    config.auxiliary, config.cache = auxiliary, str(folder / "cache")
    return config


TEACHING = AuxiliarySettings("distillation", 0.25, {"column": "teacher"})


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A job of this process."""
    with joined_ranks("cpu") as ranks:
        yield ranks


def test_the_loss_of_a_step_is_ranking_plus_the_weighted_auxiliary_loss(
    tmp_path: Path, alone: Ranks
) -> None:
    data = with_teacher(tmp_path)
    job = build_job(config_of(tmp_path, {"teaching": TEACHING}), str(data), alone)
    plain = build_job(config_of(tmp_path, {}), str(data), alone)
    assert job.model.state_dict().keys() == plain.model.state_dict().keys()
    table = next(ParquetRows.of_split(job.root, "train", job.schema).read(0, 20))
    batch = job.batch_builder()(table)
    assert batch.rows.extra is not None and batch.rows.extra.shape == (20, 1)
    assert batch.rows.extra.isnan()[:, 0].tolist() == [n % 2 == 0 for n in range(20)]
    torch.manual_seed(3)
    loss, (loss_terms, logits, _) = job.model(batch)
    assert list(loss_terms) == ["loss", "ranking", "teaching"]
    target = batch.rows.extra[:, 0].sigmoid()
    every = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
    torch.testing.assert_close(loss_terms["teaching"], every.nan_to_num(0.0).mean().detach())
    expected = loss_terms["ranking"] + 0.25 * loss_terms["teaching"]
    torch.testing.assert_close(loss.detach(), expected)
    torch.manual_seed(3)
    torch.testing.assert_close(plain.model(batch)[0].detach(), loss_terms["ranking"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a", AuxiliarySettings("distilation"), r"auxiliary\.a\.loss 'distilation' is unknown"),
        (
            "a",
            AuxiliarySettings("distillation", options={"column": "price"}),
            r"auxiliary\.a: column 'price' .*kind extra.*\['teacher'\]",
        ),
        (
            "a",
            AuxiliarySettings("distillation", options={"column": "teacher", "label": 1}),
            r"auxiliary\.a\.options\.label is 1; .*number of a label, from 0 on, among \['liked'\]",
        ),
        ("ranking", TEACHING, r"auxiliary\.ranking: "),
    ],
)
def test_a_loss_that_cannot_be_is_refused(
    tmp_path: Path, name: str, settings: AuxiliarySettings, message: str
) -> None:
    schema = load_schema(Location.of(with_teacher(tmp_path)))
    with pytest.raises(ValueError, match=message):
        build_auxiliary({name: settings}, schema)


def test_a_loss_of_one_s_own_is_a_file_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text(page_code("recsys/training/README.md", "ColumnError"))
    recipe = tmp_path / "recipe.yaml"
    lines = "auxiliary: {calm: {loss: my_losses:ColumnError, options: {column: teacher}}}\n"
    recipe.write_text(TINY.read_text() + lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = train_argv(with_teacher(tmp_path), tmp_path / "run", "--log_every_steps", "1")
    argv[argv.index(str(TINY))] = str(recipe)
    process = run_recsys(*argv)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count(" calm ") == 8
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["auc"] is not None
