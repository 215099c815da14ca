"""Exports a run as a package that answers requests without the run, its data or its encoders.

Shapes: U items of a block, E width of content vectors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.export import ExportedProgram

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.build import Job
from recsys.checkpoint.reader import stored_tables
from recsys.checkpoint.run_folder import encoder_identities, keep_vocabularies
from recsys.checkpoint.run_schema import write_run_schema
from recsys.checkpoint.state import model_state
from recsys.config import content_settings, save_config
from recsys.content.branch import ContentBranch
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import write_identities
from recsys.data.items.content_store import ContentStore
from recsys.data.parquet.file import open_parquet
from recsys.distributed.ranks import Ranks
from recsys.evaluation.predict import load_run
from recsys.model.tables import pooled_features
from recsys.serving.drift import write_statistics
from recsys.serving.exported_graph import (
    COMPILED,
    COMPILED_TOLERANCES,
    Compile,
    compile_if_possible,
    export_graph,
    is_compiled,
)
from recsys.serving.features.package_features import write_features
from recsys.serving.new_items import item_encoder
from recsys.serving.new_items.added_items import content_index
from recsys.serving.new_items.item_encoder import ITEMS_PER_CALL, EntryShapes
from recsys.serving.package import (
    GRAPH,
    REQUEST,
    Manifest,
    PackagePrecision,
    write_manifest,
)
from recsys.serving.ranking_graph import RankingGraph, RankingInputs
from recsys.serving.requests import request_columns
from recsys.serving.scorer import bounded_file
from recsys.serving.vector_file import StoredType, VectorFileShape, write_vectors
from recsys.storage.files import whole_folder
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

CONTENT_PREFIX = "model.content."  # of the branch's weights in the state of a model


def export_run(
    run: Path,
    out: Path,
    tables: StoredType,
    ranks: Ranks,
    data: str | None = None,
    compiles: Compile = False,
    precision: PackagePrecision = "run",
) -> Manifest:
    """Write the best model of a run as a package; it appears whole or not at all.

    Args:
        run: folder of the finished run.
        out: the package, a folder that does not exist.
        tables: stored type of ID tables; content vectors are in fp32, or else in fp16.
        ranks: a single process.
        data: dataset whose items are ranked; default the dataset of the run.
        compiles: also compile the graph to machine code; auto: if that is possible here.
        precision: run: as the run computes; bf16: attention and ensembles multiply in bfloat16.

    Raises:
        ValueError: the run is not finished, or its model cannot be exported or compiled.
    """
    compiles = compiles if is_compiled(compiles) else False
    job = load_for_export(run, out, ranks, data)
    columns = pooled_features(job.config.embedding, job.schema), job.schema.of_kind("dense")
    with whole_folder(out) as partial:
        model = PackagedModel(job.em3.ranking, *columns, compiles=compiles, precision=precision)
        return write_package(run, job, partial, tables, model)


def load_for_export(run: Path, out: Path, ranks: Ranks, data: str | None) -> Job:
    """Load the best model of a run on this process; make the parent folder of `out`."""
    if ranks.world_size > 1:
        raise ValueError("export runs in one process; start it without torchrun")
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it, or name another folder")
    check_output(out)
    job = load_run(run, data, ranks, "cpu", ["--compile", "false", "--kernels", "torch"])
    if job.schema.has_bounded_items:
        raise ValueError(
            f"{run}: '{job.schema.target_item}' has a vocabulary of kind bounded, but a package "
            "has content by row alone; score with `recsys predict`, or train with kind exact"
        )
    job.model.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    return job


@dataclass(frozen=True)
class PackagedModel:
    """Computations of a package."""

    ranking: nn.Module  # the ranking model, or a part of it
    pooled: list[str]  # columns that it reads
    dense: list[str]
    reads_targets: bool = True  # it reads the content of ranked items
    compiles: Compile = False  # also write its machine code
    precision: PackagePrecision = "run"


def write_package(
    run: Path, job: Job, folder: Path, tables: StoredType, model: PackagedModel
) -> Manifest:
    """Write a package into an empty folder; a ValueError says why a model cannot be exported."""
    schema = job.schema
    write_run_schema(folder, schema)
    keep_vocabularies(folder, job)
    write_features(job.root, schema, folder)
    write_statistics(job, [*model.pooled, *model.dense, schema.target_item], folder)
    for table, vocabulary in job.vocabularies.by_table.items():
        save_bounded(folder, table, vocabulary)
    columns = [*model.pooled, schema.target_item, *schema.event_columns]
    names = {schema.table_of(name) for name in columns}
    manifest = Manifest(
        run=str(run),
        ranking=job.config.ranking.name,
        labels=schema.of_kind("label"),
        pooled=model.pooled,
        dense=model.dense,
        parallel=list(schema.parallel),
        target_item=schema.target_item,
        history=schema.history,
        tables=_write_tables(run / "checkpoints" / "best", folder / "tables", tables, names),
        content=_write_content(job, folder / "content", tables, model.reads_targets),
        searches=top_k(job) > 0,
        bounded=list(job.vocabularies.by_table),
        content_histories=list(job.batch_builder().content_histories),
        entry_shapes=_write_item_encoder(job, folder / item_encoder.FOLDER),
        precision=model.precision,
    )
    program = _write_graph(job, manifest, model.ranking, folder / GRAPH)
    if model.compiles:
        tolerance = COMPILED_TOLERANCES[model.precision]
        manifest.compiled = compile_if_possible(
            program, folder / COMPILED, model.compiles, tolerance
        )
    (folder / REQUEST).write_text(_example_request(job, manifest) + "\n")
    write_manifest(folder, manifest)
    return manifest


def top_k(job: Job) -> int:
    """Return the number of history items that a search for the target's content keeps; 0: all."""
    content = content_settings(job.config.content)
    return 0 if content is None else content.history.top_k


def save_bounded(folder: Path, table: str, vocabulary: BoundedVocabulary) -> None:
    """Write the map of raw ids that was learned in training, which is whole on this process."""
    path = bounded_file(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        name: state.local_tensor() if isinstance(state, ShardedTensor) else state
        for name, state in vocabulary.state_dict().items()
    }
    save_file({name: state.contiguous() for name, state in states.items()}, path)


def _write_tables(
    checkpoint: Path, folder: Path, stored_as: StoredType, names: set[str]
) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    layouts = {}
    for name, table in stored_tables(checkpoint).items():
        if name in names:
            shape = VectorFileShape(table.num_rows, table.dim, stored_as)
            write_vectors(folder / f"{name}.vectors", shape, (rows for _, rows in table.blocks()))
            layouts[name] = asdict(shape)
    return layouts


def _write_content(
    job: Job, folder: Path, tables: StoredType, reads_targets: bool
) -> dict[str, dict[str, Any]]:
    """Write the content vectors of all items, as targets (if these are read) and in histories."""
    branch, store = job.em3.content, job.store
    if branch is None:
        return {}
    assert store is not None
    folder.mkdir()
    items, bank = np.arange(job.schema.num_items), branch.bank
    width = next(encoded_blocks(branch, store, items[:1])).shape[1]
    shape = VectorFileShape(len(items), width, "fp32" if tables == "fp32" else "fp16")
    sources = {"history": encoded_blocks(branch, store, items)}
    if bank is not None:
        sources["history"] = (bank.lookup(torch.from_numpy(ids))[0] for ids in _blocks(items))
    if reads_targets:
        sources = {"target": encoded_blocks(branch, store, items), **sources}
    for part, vectors in sources.items():
        write_vectors(folder / f"{part}.vectors", shape, vectors)
    return {part: asdict(shape) for part in sources}


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), ITEMS_PER_CALL):
        yield ids[start : start + ITEMS_PER_CALL]


def encoded_blocks(
    branch: ContentBranch, store: ContentStore, ids: np.ndarray
) -> Iterator[Tensor]:  # [U, E] each
    """Encode the content of items as the model does for ranked ones; the bank does not change."""
    for block in _blocks(ids):
        with torch.no_grad():
            vectors = branch.encode(store.gather(block))
        yield vectors


def _write_item_encoder(job: Job, folder: Path) -> EntryShapes:
    """Write what `ItemEncoder` reads; return the shape of an item's entries by modality."""
    if job.em3.content is None or job.store is None:
        return {}
    folder.mkdir()
    save_config(job.config, folder / item_encoder.CONFIG)
    write_identities(encoder_identities(job), folder)
    weights = {
        name.removeprefix(CONTENT_PREFIX): value.detach().clone()
        for name, value in model_state(job).items()
        if name.startswith(CONTENT_PREFIX)
    }
    save_file(weights, folder / item_encoder.WEIGHTS)
    np.save(folder / item_encoder.INDEX, content_index(job.store))
    shapes = {}
    for name, encoder in job.em3.content.encoders.items():
        # A cache holds the outputs of frozen layers in place of the entries.
        is_cached = cast(Encoder, encoder).is_cached
        stored = job.store.arrays[name].values.shape[1:]
        shapes[name] = list(job.store.kinds[name].entry_shape if is_cached else stored)
    return shapes


def _write_graph(job: Job, manifest: Manifest, ranking: nn.Module, path: Path) -> ExportedProgram:
    branch = job.em3.content
    dims = {name: layout["dim"] for name, layout in manifest.tables.items()}
    pooled = [torch.zeros(1, dims[job.schema.table_of(name)]) for name in manifest.pooled]
    item = torch.zeros(1, dims[manifest.target_item])
    content = torch.zeros(1, manifest.content["history"]["dim"] if manifest.content else 0)
    graph = RankingGraph(
        ranking,
        None if branch is None else branch.history_map,
        0 if branch is None else branch.dim,
        top_k(job),
        job.em3.further_histories,
        None if job.em3.scaling is None else job.em3.scaling.of_dense(manifest.dense),
        job.em3.neighbours,
        manifest.precision == "bf16",
    )
    further = job.schema.histories[1:]
    reads_content = [history.name in manifest.content_histories for history in further]
    ids = torch.zeros(1, dtype=torch.int64)
    shapes = RankingInputs(
        pooled,
        torch.zeros(1, len(manifest.dense)),
        item,
        item,
        torch.zeros(1, len(manifest.parallel)),
        ids,
        ids,
        content,
        content,
        content if manifest.searches else content[:, :0],
        [item] * len(further),
        [torch.zeros(1, len(history.numbers)) for history in further],
        [content if is_read else content[:, :0] for is_read in reads_content],
    )
    return export_graph(graph, shapes, manifest.ranking, path)


def _example_request(job: Job, manifest: Manifest) -> str:
    """Return a row as a request in JSON: the first of test, else one of the last of train."""
    files = (job.root / "test").files(".parquet")
    files = files or (job.root / job.train_folder).files(".parquet")[-1:]
    if not files:  # of another source than Parquet
        return json.dumps({"user": {}, "history": {}, "candidates": []})
    with open_parquet(files[0]) as parquet:
        user, history = request_columns(job.schema, manifest.pooled, manifest.dense)
        columns = list(dict.fromkeys([*user, *history, manifest.target_item]))
        row = next(parquet.iter_batches(1, columns=columns)).to_pylist()[0]
    request = {
        "user": {name: row[name] for name in user if not job.schema.lookup_of(name)},
        "history": {name: row[name] for name in history if not job.schema.lookup_beside(name)},
        "candidates": [row[manifest.target_item]],
    }
    return json.dumps(
        request,
        indent=1,  # times become text, decimal numbers become floats
        default=lambda value: float(value) if isinstance(value, Decimal) else str(value),
    )
