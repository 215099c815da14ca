"""A small dataset in partitions with growing vocabularies and items, and walks over it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

from recsys.checkpoint.files import folders_by_age
from recsys.checkpoint.partitions import ContinualFolder, RunState
from recsys.config import Config
from recsys.distributed.ranks import joined_ranks
from recsys.training.continual.partitions import PartitionRange
from recsys.training.continual.walk import train_continually
from tests.datasets import impressions, item_rows, write_parquet
from tests.recsys.checkpoint.kill_ranks import tensors
from tests.recsys.command_runs import tiny_config

NAMES = [f"date=2025-11-{day:02}" for day in range(8, 12)]
ROWS = [40, 33, 46, 37]  # numbers that no number of ranks divides
ITEMS = [14, 18, 22, 30]  # of the catalogue when a partition is written
SCHEMA: dict[str, Any] = {
    "target_item": "item",
    "group": "user",
    "columns": {
        "user": {
            "kind": "id",
            "num_embeddings": 12,
            "vocabulary": {"kind": "bounded", "admit_after": 2, "half_life": 50.0},
        },
        "item": {"kind": "id", "num_embeddings": 40, "vocabulary": {"kind": "exact"}},
        "history": {"kind": "sequence", "shares": "item", "parallel": ["history_liked"]},
        "genres": {
            "kind": "ids",
            "num_embeddings": 50,
            "vocabulary": {"kind": "hash", "num_hashes": 2, "seed": 1},
        },
        "price": {"kind": "dense"},
        "liked": {"kind": "label"},
    },
    "items": {"id": "item", "columns": {"text": {"kind": "text"}}},
}
# A table for two thirds of the items: others get the rows of those that are used no more.
BOUNDED_ITEMS = {
    "kind": "id",
    "num_embeddings": 20,
    "vocabulary": {"kind": "bounded", "half_life": 4.0},
}
ARGV = ["--device", "cpu", "--batch_size", "8", "--embedding.skip", "[]"]
WITHOUT_CONTENT = ["--content", "none", "--contrastive.weight", "0"]


def write_walk(folder: Path, count: int = len(NAMES), bounded_items: bool = False) -> Path:
    """Write the first partitions, each with the items that are new in it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = SCHEMA["columns"] | ({"item": BOUNDED_ITEMS} if bounded_items else {})
    schema = yaml.safe_dump({**SCHEMA, "columns": columns}, sort_keys=False)
    (folder / "schema.yaml").write_text(schema)
    for number in range(count):
        write_partition(folder, number)
    return folder


def write_partition(folder: Path, number: int, is_complete: bool = True) -> Path:
    """Write a partition in two files, and a file of items."""
    first_new = ITEMS[number - 1] if number else 0
    items = item_rows(max(ITEMS), np.random.default_rng(100))
    ids = items["item"].to_numpy()
    new = items.filter((ids >= first_new) & (ids < ITEMS[number])).select(["item", "text"])
    write_parquet(folder / "items" / f"part-{number}.parquet", new)
    table = impressions(ROWS[number], 10, ITEMS[number], np.random.default_rng(number))
    partition = folder / "train" / NAMES[number]
    for file_number, rows in enumerate((table.slice(0, 20), table.slice(20))):
        write_parquet(partition / f"part-{file_number}.parquet", rows, row_group_size=11)
    if is_complete:
        (partition / "_SUCCESS").touch()
    return partition


def config_of(folder: Path, *argv: str) -> Config:
    return tiny_config(folder / "cache", *ARGV, *argv)


def walk(
    folder: Path,
    run: Path,
    *argv: str,
    data: Path | None = None,
    first: str | None = None,
    last: str | None = None,
    **options: Any,
) -> RunState:
    """Walk `folder`/data on one rank."""
    with joined_ranks("cpu") as ranks:
        config, data_path = config_of(folder, *argv), str(data or folder / "data")
        span = PartitionRange(first, last)
        return train_continually(config, data_path, run, ranks, span, **options)


def rewound(walked: Path, out: Path) -> ContinualFolder:
    """A copy of a walk with its data and cache in `out`, as before the last partition."""
    shutil.copytree(walked, out, dirs_exist_ok=True)
    folder = ContinualFolder(out / "run")
    *trained, last = folder.read().trained
    folder.write(RunState(tuple(trained)))
    shutil.rmtree(folder.run_of(last.name))
    folder.scores_of(last.name).unlink()
    lines = (folder.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder.path / "metrics.jsonl").write_text("".join(lines[:-1]))
    return folder


def change_labels(partition: Path) -> None:
    """Turn the labels of a partition around."""
    for file in sorted(partition.glob("*.parquet")):
        table = pq.read_table(file)
        turned = pc.subtract(pa.scalar(1.0, pa.float32()), table["liked"])
        index = table.column_names.index("liked")
        pq.write_table(table.set_column(index, "liked", turned), file, row_group_size=11)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but those that only last as long as a job."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".lock")
    }


def contents_of(path: Path) -> bytes | dict[str, bytes]:
    """A file, or all files of a folder that may be missing."""
    return path.read_bytes() if path.is_file() else files_of(path)


def assert_same_end(one: Path, two: Path) -> int:
    """The same bits in models, checkpoints, scores and metrics; returns the tensors compared."""
    folders, compared = (ContinualFolder(one), ContinualFolder(two)), 0
    states = [folder.read() for folder in folders]
    assert states[0] == states[1] and states[0].begun is None
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    for file in sorted((one / "scores").iterdir()):  # the metadata names the model's files
        assert pq.read_table(file).equals(pq.read_table(two / "scores" / file.name)), file.name
    names = [sorted(run.name for run in folder.partitions.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        runs = [folder.partitions / name for folder in folders]
        for name_of_file in ("schema.yaml", "item_counts.npy", "vocabulary"):
            contents = [contents_of(run / name_of_file) for run in runs]
            assert contents[0] == contents[1], name_of_file
        checkpoints = [folders_by_age(run / "checkpoints")[0].name for run in runs]
        assert checkpoints[0] == checkpoints[1]
        for checkpoint in ("best", checkpoints[0]):
            first, second = (tensors(run / "checkpoints" / checkpoint) for run in runs)
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert torch.equal(value, second[key]), f"{name} {checkpoint}: {key}"
            compared += len(first)
    return compared


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
