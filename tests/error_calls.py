"""Cases of mistakes: the call that refuses a mistake, and what its error must name."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from embeddings import TableConfig
from recsys.checkpoint.files import read_manifest as read_checkpoint
from recsys.checkpoint.partitions import RunState, TrainedPartition
from recsys.checkpoint.run_folder import find_start
from recsys.config import ContentSettings, load_config
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.movielens.prepare import prepare_movielens
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.plug_in.settings import check, load_plug_in_settings
from recsys.serving.package import read_manifest
from recsys.storage.location import Location
from recsys.storage.output_file import check_output, check_run_folder
from recsys.training.continual.partitions import (
    PartitionRange,
    check_complete,
    list_partitions,
    next_partition,
    require_order_of_time,
    require_rows,
)
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY
from tests.recsys.config import bad_settings
from tests.recsys.data import bad_impressions
from tests.recsys.data.bad_impressions import BadInput
from tests.recsys.data.events.test_events_bad_inputs import BAD, prepare, write_inputs
from tests.recsys.data.items import bad_items
from tests.recsys.data.movielens.movielens_sources import write_source
from tests.recsys.data.parquet import bad_files
from tests.recsys.serving.test_package import MANIFEST, write_package
from tests.recsys.serving.test_requests import USER, reader


@dataclass(frozen=True)
class Case:
    """What a user did, the call that refuses it in an empty folder, and what the error names."""

    action: str
    call: Callable[[Path], object]
    names: tuple[str, ...]


def setting(option: str, *names: str) -> Case:
    """A setting of the command line."""
    return Case(f"`{option}`", lambda folder: load_config(TINY, [option]), names)


def recipe(action: str, text: str, *names: str) -> Case:
    def call(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(text)
        load_config(folder / "recipe.yaml")

    return Case(action, call, ("recipe.yaml", *names))


@cache
def good_dataset() -> tempfile.TemporaryDirectory[str]:
    scratch = tempfile.TemporaryDirectory()
    write_dataset(Path(scratch.name, "data"), {"train": 61, "valid": 25, "test": 23})
    return scratch


@cache
def content_of(settings: tuple[str, ...]) -> ContentSettings:
    content = load_config(TINY, list(settings)).content
    assert content is not None
    return content


def of_dataset(action: str, bad: BadInput, read: Callable[[Path], object], *names: str) -> Case:
    def call(folder: Path) -> None:
        bad.spoil(Path(shutil.copytree(Path(good_dataset().name, "data"), folder / "data")))
        read(folder / "data")

    return Case(action, call, names)


def schema_of(data: Path) -> None:
    load_schema(Location.of(data))


def impressions_of(data: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = ParquetRows.of_split(Location.of(data), split, load_schema(Location.of(data)))
        list(rows.read(0, rows.num_rows))


def items_of(settings: tuple[str, ...], data: Path) -> None:
    content = content_of(settings)
    items = ItemTable(Location.of(data), load_schema(Location.of(data)))
    store = ContentStore(items, content.modalities, data.parent / "cache")
    for name in content.modalities:
        store.build(name)


def changed_schema(old: str, new: str, *names: str) -> Case:
    bad = BadInput(bad_settings.schema(old, new), [])
    return of_dataset(f"`{new}` in schema.yaml", bad, schema_of, "schema.yaml", *names)


def row(name: str, *names: str) -> Case:
    cases = bad_impressions.TYPES | bad_impressions.VALUES | bad_files.FILES
    return of_dataset(name, cases[name], impressions_of, *names)


def item(name: str, *names: str) -> Case:
    bad = bad_items.ITEMS[name]
    return of_dataset(name, bad, partial(items_of, bad.settings), *names)


def log(name: str, *names: str) -> Case:
    """A spoilt event log or its settings."""
    (bad,) = [case for case in BAD if case.name == name]

    def call(folder: Path) -> None:
        config = write_inputs(folder)
        bad.spoil(folder, config)
        prepare(folder, config)

    return Case(name, call, names or bad.messages)


def movielens(action: str, ratings: str, *names: str) -> Case:
    def call(folder: Path) -> None:
        write_source(folder / "source", [], [(1, "Heat", "Drama")])
        header = "userId,movieId,rating,timestamp\n"
        (folder / "source" / "ratings.csv").write_text(header + ratings)
        prepare_movielens(folder / "source", folder / "data")

    return Case(action, call, ("ratings.csv", *names))


def request(action: str, *names: str, **fields: Any) -> Case:
    """A request to a package."""
    values = {"user": USER, "history": (), "candidates": ["ann"]} | fields
    return Case(action, lambda folder: reader()(**values), names)


def package(action: str, change: Callable[[Path], object], *names: str) -> Case:
    def call(folder: Path) -> None:
        write_package(folder / "package")
        change(folder / "package")
        read_manifest(folder / "package")

    return Case(action, call, names)


def with_format(package: Path) -> None:
    content = json.loads((package / MANIFEST).read_text())
    (package / MANIFEST).write_text(json.dumps(content | {"format": 99}))


def partitions(
    action: str,
    files: Sequence[str],
    *names: str,
    trained: Sequence[str] = (),
    span: PartitionRange | None = None,
) -> Case:
    """Files of a dataset in partitions, some of which are trained on."""

    def call(folder: Path) -> None:
        for name in files:
            (folder / "data" / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "data" / "train" / name).write_text("")
        root = Location.of(folder / "data")
        state = RunState(tuple(TrainedPartition(name, 1, "") for name in trained))
        partitions = list_partitions(root)
        require_order_of_time(root / "train", partitions)
        partition = next_partition(root / "train", partitions, state, span or PartitionRange())
        assert partition is not None
        check_complete(root, partition, partitions)
        require_rows(root, partition)

    return Case(action, call, names)


def plug_in(action: str, text: str, *names: str) -> Case:
    def call(folder: Path) -> None:
        (folder / "content.yaml").write_text(text)
        check(load_plug_in_settings(folder / "content.yaml"))

    return Case(action, call, names)


def table(action: str, *names: str, **changes: Any) -> Case:
    fields = {"name": "item", "num_embeddings": 3, "embedding_dim": 4, "features": ["item"]}
    return Case(action, lambda folder: TableConfig(**(fields | changes)), names)


def damaged_checkpoint(folder: Path) -> None:
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "checkpoint.json").write_text('{"format": 9}')
    read_checkpoint(folder / "step-00000001")


def output_over_input(folder: Path) -> None:
    (folder / "rows.parquet").touch()
    check_output(folder / "rows.parquet", [Location.of(folder / "rows.parquet")])


def run_in_dataset(folder: Path) -> None:
    check_run_folder(folder / "data" / "train", str(folder / "data"))


def resumed_without_a_run(folder: Path) -> None:
    with joined_ranks("cpu") as ranks:
        find_start(folder / "run", "must", False, ranks)


def unprepared_vocabulary(data: Path) -> None:
    bad_settings.schema("num_embeddings: 10", "num_embeddings: 10, vocabulary: {kind: exact}")(data)
