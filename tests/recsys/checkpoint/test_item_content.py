"""Items edited after training: histories read from the bank what ranked items are encoded from."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from recsys.build import Job, build_job
from recsys.checkpoint import item_content
from recsys.checkpoint.manager import Checkpoints
from recsys.distributed.log import configure_logging
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.checkpoint.stopped_runs import config_of

EDITED, REMOVED, NEW = [3, 7], 5, 8
CHANGED = [3, 5, 7, 8]
UNCHANGED = [item for item in range(30) if item not in CHANGED]


def write_items(data: Path, table: pa.Table) -> None:
    pq.write_table(table, data / "items" / "part-0.parquet", row_group_size=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a copy of it in which items were edited, removed and added."""
    folder = tmp_path_factory.mktemp("items")
    for name in ("data", "edited"):
        items = pq.read_table(write_dataset(folder / name) / "items")
        ids = items["item"].to_pylist()
        if name == "edited":
            texts = items["text"].to_pylist()
            texts = [f"{w} new" if i in EDITED else w for i, w in zip(ids, texts, strict=True)]
            items = items.set_column(items.column_names.index("text"), "text", pa.array(texts))
        write_items(
            folder / name, items.filter(pc.field("item") != (NEW if name == "data" else REMOVED))
        )
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with joined_ranks("cpu") as ranks:
        train(config_of(folder, "--epochs", "1"), str(folder / "data"), folder / "run", ranks)
    return folder / "run"


def bank_of(job: Job) -> Tensor:  # [30, D]
    assert job.em3.content is not None and job.em3.content.bank is not None
    return job.em3.content.bank.lookup(torch.arange(30))[0]


@torch.no_grad()
def encoded(job: Job) -> Tensor:  # [4, D]
    """The changed items as the model ranks them."""
    assert job.em3.content is not None and job.store is not None
    return job.em3.eval().content.encode(job.store.gather(np.array(CHANGED)))


def test_changed_items_are_encoded_into_the_bank_by_the_loaded_model_and_counted(
    folder: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with joined_ranks("cpu") as ranks:
        old_bank = bank_of(load_run(run, None, ranks, "cpu"))
        configure_logging()
        job = load_run(run, str(folder / "edited"), ranks, "cpu")
        bank, expected = bank_of(job), encoded(job)
    torch.testing.assert_close(bank[CHANGED], expected)
    assert ((old_bank[CHANGED] - expected).abs().amax(dim=1) > 1e-3).all()
    assert torch.equal(bank[UNCHANGED], old_bank[UNCHANGED])
    assert re.search("2 of 29 items .*1 are new .*1 are gone", capfd.readouterr().out)


def restored(folder: Path, data: str, run: Path, ranks: Ranks) -> Job:
    """A job that goes on from the last checkpoint."""
    job = build_job(config_of(folder, "--epochs", "2"), str(folder / data), ranks)
    checkpoints = Checkpoints(job, run, job.rows("train").fingerprint())
    try:
        assert checkpoints.restore() is not None
    finally:
        checkpoints.close()
    return job


def test_training_goes_on_with_the_bank_of_the_edited_items(folder: Path, run: Path) -> None:
    with joined_ranks("cpu") as ranks:
        old_bank = bank_of(restored(folder, "data", run, ranks))
        job = restored(folder, "edited", run, ranks)
        torch.testing.assert_close(bank_of(job)[CHANGED], encoded(job))
        assert torch.equal(bank_of(job)[UNCHANGED], old_bank[UNCHANGED])


def test_items_in_another_order_are_not_changed(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    write_items(tmp_path / "data", pq.read_table(folder / "data" / "items").sort_by("item"))
    calls: list[Any] = []
    monkeypatch.setattr(item_content, "encode_into_bank", lambda *args, **_: calls.append(args))
    with joined_ranks("cpu") as ranks:
        load_run(run, str(tmp_path / "data"), ranks, "cpu")
        assert not calls
        load_run(run, str(folder / "edited"), ranks, "cpu")
    assert len(calls) == 1


def test_where_the_hashes_are_lost_all_items_are_encoded(
    folder: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (file,) = (tmp_path / "run" / "item_content").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    configure_logging()
    with joined_ranks("cpu") as ranks:
        job = load_run(tmp_path / "run", str(folder / "edited"), ranks, "cpu")
        torch.testing.assert_close(bank_of(job)[CHANGED[2:]], encoded(job)[2:])
    logged = capfd.readouterr().out
    assert str(file) in logged and "all 29 items" in logged
