"""Checkpoints are read without running code in them, and tables leave them as Parquet."""

import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from recsys.build import build_job
from recsys.checkpoint import reader
from recsys.checkpoint.reader import SafeFileSystemReader, export_tables
from recsys.checkpoint.state import model_state
from recsys.config import load_config
from recsys.distributed.ranks import joined_ranks
from tests.datasets import write_dataset
from tests.embeddings.tables_model import (
    full_table,
    initial_tables,
    local_shards,
    sharded_model,
    table_configs,
)
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "ids": torch.tensor([1, 2])}
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


class Evil:
    """Unpickled without restriction, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_the_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "mark"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match=r"\.metadata: .*posix\.mkdir"):
        SafeFileSystemReader(folder)
    assert not marker.exists()
    with pytest.raises(AttributeError):  # the library itself runs it before it stumbles
        dcp.FileSystemReader(folder).read_metadata()
    assert marker.exists()


def test_entries_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    dcp.save({"step": 3}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ValueError, match="entry 'step'"):
        SafeFileSystemReader(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"text", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_a_clear_error(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata: "):
        SafeFileSystemReader(folder).read_metadata()


def test_a_tensor_file_with_other_objects_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    storage = next(iter(metadata.storage_data.values()))
    file, marker = folder / storage.relative_path, tmp_path / "mark"
    with (tmp_path / "evil").open("wb") as stream:
        torch.save(Evil(marker), stream)
    evil = (tmp_path / "evil").read_bytes()
    file.write_bytes(evil)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    state = {"weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointException, match="Weights only"):
        dcp.load(state, storage_reader=SafeFileSystemReader(folder), no_dist=True)
    assert not marker.exists()


SHARDINGS = ["row_wise", "table_wise", "column_wise"]


def key(table: str) -> str:
    """Where a model's checkpoint has a table."""
    collection = "embeddings.embeddings" if table == "item" else "embedding_bags.embedding_bags"
    return f"model.{collection}.{table}.weight"


def save(folder: Path, tables: dict[str, Tensor]) -> Path:
    """A checkpoint of whole tables, with something that is none."""
    state = {key(name): value for name, value in tables.items()}
    state["model.content.encoders.text.model.embeddings.embeddings.word.weight"] = torch.ones(2, 3)
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def exported(file: Path) -> dict[str, Tensor]:
    """Tables by name, the rows in their places."""
    rows = pq.read_table(file).to_pylist()
    names = list(dict.fromkeys(row["table"] for row in rows))
    tables = {}
    for name in names:
        table_rows = [row for row in rows if row["table"] == name]
        assert [row["row"] for row in table_rows] == list(range(len(table_rows)))
        tables[name] = torch.tensor([row["vector"] for row in table_rows])
    return tables


def assert_equal(tables: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tables.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tables[name], value), name


# On ranks


def save_shards(rank: int, world_size: int, folder: str) -> None:
    for sharding in SHARDINGS:
        state = sharded_model(table_configs(sharding)).state_dict()  # type: ignore[arg-type]
        tables = {
            key(name.split(".")[-2]): value
            for name, value in state.items()
            if not name.startswith("dense.")
        }
        dcp.save(tables, checkpoint_id=Path(folder, sharding))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint per sharding, written by two ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_shards, 2, str(folder))
    return folder


# Blocks of one row, of three rows (over the borders of pieces), and of a table.
@pytest.mark.parametrize(("block_bytes", "blocks"), [(1, 20), (3 * 8 * 4, 8), (2**20, 3)])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_tables_cut_by_ranks_are_put_together(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharding: str,
    block_bytes: int,
    blocks: int,
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    counts = export_tables(checkpoints / sharding, tmp_path / "tables.parquet")
    assert counts == {"user": 10, "tags": 3, "item": 7}
    assert pq.read_metadata(tmp_path / "tables.parquet").num_row_groups == blocks
    assert_equal(exported(tmp_path / "tables.parquet"), initial_tables())


# Form


def test_the_tables_of_a_model_are_found_in_its_checkpoint(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    config = load_config(TINY, ["--content", "none", "--device", "cpu"])
    with joined_ranks("cpu") as ranks:
        job = build_job(config, str(data), ranks)
        dcp.save(model_state(job), checkpoint_id=tmp_path / "best")
        expected = {name: full_table(shards) for name, shards in local_shards(job.model).items()}
    export_tables(tmp_path / "best", tmp_path / "tables.parquet")
    assert set(expected) == {"item", "genres"}
    assert_equal(exported(tmp_path / "tables.parquet"), expected)


def test_a_file_has_typed_columns_and_row_groups_of_one_table(tmp_path: Path) -> None:
    folder = save(tmp_path / "best", {"user": torch.rand(4, 8), "item": torch.rand(2, 8)})
    export_tables(folder, tmp_path / "tables.parquet")
    file = pq.ParquetFile(tmp_path / "tables.parquet")
    kinds = {field.name: field.type for field in file.schema_arrow}
    assert kinds == {
        "table": pa.dictionary(pa.int32(), pa.string()),
        "row": pa.int64(),
        "vector": pa.list_(pa.float32(), 8),
    }
    groups = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
    assert [(group.min, group.max) for group in groups] == [("item", "item"), ("user", "user")]


def test_tables_of_several_dimensions_share_a_file_as_plain_lists(tmp_path: Path) -> None:
    tables = {"item": torch.rand(2, 8), "user": torch.rand(4, 3)}
    export_tables(save(tmp_path / "best", tables), tmp_path / "tables.parquet")
    assert pq.read_schema(tmp_path / "tables.parquet").field("vector").type == pa.list_(
        pa.float32()
    )
    assert_equal(exported(tmp_path / "tables.parquet"), tables)


def test_only_the_tables_that_are_named_are_written(tmp_path: Path) -> None:
    tables = {"item": torch.rand(2, 8), "user": torch.rand(4, 3)}
    folder = save(tmp_path / "best", tables)
    out = tmp_path / "new folder" / "user.parquet"
    assert export_tables(folder, out, ["user", "user"]) == {"user": 4}
    assert_equal(exported(out), {"user": tables["user"]})


def test_weights_of_half_precision_are_written_as_float32(tmp_path: Path) -> None:
    table = torch.rand(5, 8).to(torch.bfloat16)
    export_tables(save(tmp_path / "best", {"item": table}), tmp_path / "item.parquet")
    assert_equal(exported(tmp_path / "item.parquet"), {"item": table.float()})


def test_of_a_large_piece_only_the_wanted_rows_are_read(tmp_path: Path) -> None:
    table = torch.rand(2**16, 64)  # 16 MiB, as one piece
    stored = reader.stored_tables(save(tmp_path / "best", {"item": table}))["item"]
    old_bytes = _bytes_read()
    assert torch.equal(stored.rows(50_000, 50_016), table[50_000:50_016])
    assert _bytes_read() - old_bytes < 2**18


def _bytes_read() -> int:
    """By this process so far, from files and caches alike."""
    return int(Path("/proc/self/io").read_text().split()[1])


# Errors


def test_what_cannot_be_exported_is_told_with_the_fix(tmp_path: Path) -> None:
    folder = save(tmp_path / "best", {"item": torch.rand(2, 8)})
    out = tmp_path / "item.parquet"
    with pytest.raises(ValueError, match=r"best: .*'user'.*\['item'\]"):
        export_tables(folder, out, ["item", "user"])
    with pytest.raises(ValueError, match="absent: no checkpoint"):
        export_tables(tmp_path / "absent", out)
    with pytest.raises(ValueError, match=r"best: .*folder"):
        export_tables(folder, folder)
    dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(ValueError, match=r"other: .*tables"):
        export_tables(tmp_path / "other", out)
    assert not out.exists()


@pytest.mark.parametrize("num_bytes", [None, 0, 700, 60_000])
def test_a_checkpoint_cut_short_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int | None
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2**12)
    folder = save(tmp_path / "best", {"item": torch.rand(2000, 8)})
    out = tmp_path / "item.parquet"
    out.write_text("the earlier one")
    (file,) = folder.glob("*.distcp")
    if num_bytes is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"\.distcp: table 'item'"):
        export_tables(folder, out)
    assert out.read_text() == "the earlier one"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
