"""A tiny run with tables of every kind, and new runs that are begun from it without a step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job, build_job
from recsys.checkpoint.files import folders_by_age
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.reader import SafeFileSystemReader, StoredTensor
from recsys.checkpoint.state import TrainingState
from recsys.checkpoint.warm_start.plan import WarmStartPlan, plan_warm_start
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config
from recsys.data.parquet.rows import ParquetRows
from recsys.data.prepare import prepare_transforms
from recsys.data.vocabularies import UnknownIds
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.evaluate import check_data
from recsys.training.initial_state import open_warm_start, start_warm
from recsys.training.train import train
from tests.recsys.checkpoint.schema_runs import SCHEMA, copy_of, write_data, write_schema
from tests.recsys.command_runs import tiny_config

ARGV = ["--device", "cpu", "--batch_size", "16", "--embedding.skip", "[]"]
WITHOUT_CONTENT = ["--content", "none", "--contrastive.weight", "0"]
Change = Callable[[dict[str, Any]], object]


def config_of(folder: Path, *argv: str) -> Config:
    return tiny_config(folder / "cache", *ARGV, *argv)


def write_run(folder: Path, *argv: str) -> Path:
    """A dataset in `folder`/data with columns of every kind, and a run trained on it."""
    data = write_data(folder / "data")
    schema = copy.deepcopy(SCHEMA)
    scaled = {"kind": "dense", "column": "age", "transform": ["standardize"]}
    schema["columns"]["scaled"] = scaled
    schema["items"]["columns"]["clip"] = {"kind": "feature"}
    write_schema(data, schema)
    prepare_transforms(str(data))
    with joined_ranks("cpu") as ranks:
        train(config_of(folder, *argv), str(data), folder / "run", ranks)
    return folder


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy of the run's dataset with another `schema.yaml`."""
    data = copy_of(folder / "data", out / "data")
    schema = yaml.safe_load((data / "schema.yaml").read_text())
    change(schema)
    write_schema(data, schema)
    return data


def grow(schema: dict[str, Any]) -> None:
    """Gives three tables more rows."""
    sizes = {"shop": 8, "item": 55, "user": 300}
    for name, size in sizes.items():
        schema["columns"][name]["num_embeddings"] = size


@dataclass(frozen=True)
class NewRun:
    """A new run before its first step."""

    job: Job
    plan: WarmStartPlan
    progress: Progress

    @property
    def text(self) -> str:
        return str(self.plan.differences)


def begin(
    folder: Path,
    out: Path,
    ranks: Ranks,
    *argv: str,
    data: Path | None = None,
    change: Callable[[Config], object] = lambda _: None,
    **request: Any,
) -> NewRun:
    """Begin a run from `folder`/run; a collective."""
    config = config_of(folder, *argv)
    change(config)
    data_path = str(data or folder / "data")
    opened_request = WarmStart(**{"run": folder / "run", **request})
    source, schema = open_warm_start(opened_request, data_path, out, ranks)
    job = build_job(config, data_path, ranks, schema)
    plan = plan_warm_start(job, source)
    out.mkdir(exist_ok=True)
    return NewRun(job, plan, start_warm(job, out, plan, check_data(job).numbers))


@contextmanager
def start(folder: Path, out: Path, *argv: str, **arguments: Any) -> Iterator[NewRun]:
    """As `begin`, on one rank."""
    with joined_ranks("cpu") as ranks:
        yield begin(folder, out, ranks, *argv, **arguments)


@torch.no_grad()
def logits(job: Job) -> Tensor:
    """Predictions of the first rows of the validation split, the same rows on every rank."""
    rows = next(ParquetRows.of_split(job.root, "valid", job.schema).read(0, 24))
    loaded = iter([job.batch_builder()(rows)])
    (batch,) = job.preparation(loaded, UnknownIds(job.schema), 0, training=False)
    job.model.eval()
    result: Tensor = job.model(batch)[1][1]
    return result.clone()


def full_tensor(value: Tensor | ShardedTensor) -> Tensor:
    """A tensor of a job of one rank."""
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    size, shards = tuple(value.metadata().size), value.local_shards()
    result = torch.full(size, 77, dtype=shards[0].tensor.dtype)
    for shard in shards:
        sides = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        result[tuple(slice(first, first + count) for first, count in sides)] = shard.tensor
    return result


def state_of(job: Job) -> dict[str, Tensor]:
    """The whole state of a job of one rank; tables by their names alone."""
    state = {name: full_tensor(value) for name, value in TrainingState(job).state_dict().items()}
    tables = {name: value for name, value in state.items() if name.startswith("model.embedding")}
    return state | {name.split(".")[-2]: value for name, value in tables.items()}


def stored_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; tables by their names alone, too."""
    reader = SafeFileSystemReader(checkpoint)
    state = {}
    for name, entry in reader.entries.items():
        if not name.startswith("random."):
            tensor = StoredTensor(reader, name)
            state[name] = tensor.rows(0, entry.size[0]) if entry.size else torch.zeros(0)
    tables = {name: value for name, value in state.items() if name.startswith("model.embedding")}
    return state | {name.split(".")[-2]: value for name, value in tables.items()}


def last_of(folder: Path) -> Path:
    return folders_by_age(folder / "run" / "checkpoints")[0]


def best_of(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "best"


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor], *prefixes: str) -> None:
    names = [name for name in expected if name.startswith(prefixes) and expected[name].numel()]
    assert names
    for name in names:
        assert torch.equal(state[name], expected[name]), name


def ids_of(data: Path) -> list[Any]:
    """The raw ids of the items, by row."""
    file = data / "vocabulary" / "item.parquet"
    return list(ExactVocabulary.load(str(file), 1000).ids.to_pylist())


def write_ids(data: Path, ids: list[Any]) -> Path:
    """Replace the map of the items by one of these ids."""
    vocabulary = ExactVocabulary(len(ids) + 1)
    vocabulary.extend([pa.array(ids)])
    vocabulary.save(str(data / "vocabulary" / "item.parquet"))
    return data
