"""Exports a run as a package that answers requests without the run, its data or its encoders.

Shapes: E width of content vectors.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.export import ExportedProgram

from embeddings.vocabulary.bounded import BoundedVocabulary
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.files import model_of
from recsys.checkpoint.reader import stored_tables
from recsys.checkpoint.run_folder import encoder_identities, keep_vocabularies
from recsys.checkpoint.run_schema import write_run_schema
from recsys.checkpoint.state import model_state
from recsys.config import content_settings, save_config
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import write_identities
from recsys.data.parquet.file import open_parquet, read_row_group
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION, is_list
from recsys.distributed.ranks import Ranks
from recsys.evaluation.predict import load_run
from recsys.model.tables import pooled_features
from recsys.serving.exported_graph import (
    COMPILED,
    Compile,
    compile_graph,
    export_graph,
    is_compiled,
)
from recsys.serving.features.package_features import write_features
from recsys.serving.new_items import item_encoder
from recsys.serving.new_items.added_items import content_index
from recsys.serving.new_items.item_encoder import ITEMS_PER_CALL, EntryShapes, encoded_blocks
from recsys.serving.package import (
    GRAPH,
    REQUEST,
    STATISTICS,
    Manifest,
    PackagePrecision,
    write_manifest,
)
from recsys.serving.ranking_graph import RankingGraph, RankingInputs
from recsys.serving.requests import request_columns
from recsys.serving.scorer import bounded_file
from recsys.serving.vector_file import StoredType, VectorFileShape, write_vectors
from recsys.storage.files import atomic_folder
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

MAX_ROWS = 1 << 18  # sampled for statistics, in evenly spaced row groups, at least one
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

    The arguments are those of `recsys export`, and `ranks` is a single process. A run that is not
    finished, or whose model cannot be exported or compiled, is a ValueError.
    """
    compiles = compiles if is_compiled(compiles) else False
    job = load_for_export(run, out, ranks, data)
    with atomic_folder(out) as partial:
        return write_package(
            run,
            job,
            partial,
            ranking=job.em3.ranking,
            pooled=pooled_features(job.config.embedding, job.schema),
            dense=job.schema.of_kind("dense"),
            tables=tables,
            compiles=compiles,
            precision=precision,
        )


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


def write_package(
    run: Path,
    job: Job,
    folder: Path,
    ranking: nn.Module,
    pooled: list[str],
    dense: list[str],
    tables: StoredType = "fp32",
    reads_targets: bool = True,
    compiles: Compile = False,
    precision: PackagePrecision = "run",
) -> Manifest:
    """Write a package into an empty folder; a ValueError says why a model cannot be exported.

    `ranking` is the ranking model or a part of it, `pooled` and `dense` are columns that it reads.
    `reads_targets`: it reads the content of ranked items.
    """
    schema = job.schema
    write_run_schema(folder, schema)
    keep_vocabularies(folder, job)
    write_features(job.root, schema, folder)
    write_statistics(job, [*pooled, *dense, schema.target_item], folder)
    for table, vocabulary in job.vocabularies.by_table.items():
        save_bounded(folder, table, vocabulary)
    columns = [*pooled, schema.target_item, *schema.event_columns]
    names = {schema.table_of(name) for name in columns}
    manifest = Manifest(
        run=str(run),
        ranking=job.config.ranking.name,
        labels=schema.of_kind("label"),
        pooled=pooled,
        dense=dense,
        parallel=list(schema.parallel),
        target_item=schema.target_item,
        history=schema.history,
        tables=_write_tables(run / "checkpoints" / "best", folder / "tables", tables, names),
        content=_write_content(job, folder / "content", tables, reads_targets),
        searches=top_k(job) > 0,
        bounded=list(job.vocabularies.by_table),
        content_histories=list(job.batch_builder().content_histories),
        entry_shapes=_write_item_encoder(job, folder / item_encoder.FOLDER),
        precision=precision,
        model=model_of(run),
    )
    program = _write_graph(job, manifest, ranking, folder / GRAPH)
    if compiles:
        manifest.compiled = compile_graph(program, folder / COMPILED, compiles)
    (folder / REQUEST).write_text(_example_request(job, manifest) + "\n")
    write_manifest(folder, manifest)
    return manifest


def write_statistics(job: Job, columns: Sequence[str], folder: Path) -> None:
    """Write shares of `unknown` and `null` and the range of numbers, of a sample of training rows.

    A run with rows of another source than Parquet has none.
    """
    files = (job.root / job.train_folder).files(".parquet")
    statistics: dict[str, dict[str, float]] = {}
    if files and job.config.source.name == "parquet":
        rows = ParquetRows(files, job.schema, with_labels=False, on_bad_row="skip")
        largest = max(chunk.num_rows for chunk in rows.chunks)
        number = min(max(1, MAX_ROWS // largest), len(rows.chunks))
        groups = np.linspace(0, len(rows.chunks) - 1, number).astype(int).tolist()
        usable = pa.concat_tables(rows.read_chunks(groups))
        usable = usable.filter(pc.greater_equal(usable[ROW_POSITION], 0))  # no skipped rows
        statistics = dict(_column_statistics(job, usable, columns))
        names = job.schema.file_columns(columns)
        tables = []
        for group in (rows.row_groups[number] for number in groups):
            with open_parquet(group.file) as parquet:
                tables.append(read_row_group(parquet, group.file, group.index, names))
        for name in names:  # files may differ in types
            nulls = sum(table[name].null_count for table in tables)
            statistics.setdefault(name, {})["null"] = nulls / sum(map(len, tables))
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")


def _column_statistics(
    job: Job, rows: pa.Table, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the share of unknown ids of each column with an exact map, and ranges of numbers."""
    for name in columns:
        values = rows[name].combine_chunks()
        values = values.flatten() if is_list(values.type) else values
        numbers = values.to_numpy(zero_copy_only=False)
        vocabulary = job.schema.vocabularies.get(job.schema.table_of(name))
        if not len(numbers):
            continue
        if job.schema.columns[name].kind == "dense":
            yield name, {"low": float(numbers.min()), "high": float(numbers.max())}
        elif isinstance(vocabulary, ExactVocabulary):
            yield name, {"unknown": float((numbers == vocabulary.unknown_row).mean())}


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
            shape = VectorFileShape(table.size[0], table.size[1], stored_as)
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
    stored_as: StoredType = "fp32" if tables == "fp32" else "fp16"
    shape = VectorFileShape(len(items), branch.vector_dim, stored_as)
    sources = {"history": encoded_blocks(branch, store, items)}
    if bank is not None:
        blocks = torch.from_numpy(items).split(ITEMS_PER_CALL)
        sources["history"] = (bank.lookup(block)[0] for block in blocks)
    if reads_targets:
        sources = {"target": encoded_blocks(branch, store, items), **sources}
    for kind, vectors in sources.items():
        write_vectors(folder / f"{kind}.vectors", shape, vectors)
    return {kind: asdict(shape) for kind in sources}


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
    content = torch.zeros(1, 0 if branch is None else branch.vector_dim)
    graph = RankingGraph(
        ranking,
        history_map=None if branch is None else branch.history_map,
        content_dim=0 if branch is None else branch.dim,
        top_k=top_k(job),
        further_histories=job.em3.further_histories,
        scaling=None if job.em3.scaling is None else job.em3.scaling.select_dense(manifest.dense),
        neighbours=job.em3.neighbours,
        bfloat16=manifest.precision == "bf16",
    )
    extra, with_content = job.schema.histories[1:], manifest.content_histories
    unread, ids = content[:, :0], torch.zeros(1, dtype=torch.int64)
    shapes = RankingInputs(
        pooled=pooled,
        dense=torch.zeros(1, len(manifest.dense)),
        target=item,
        history=item,
        parallel=torch.zeros(1, len(manifest.parallel)),
        target_items=ids,
        history_items=ids,
        target_content=content,
        history_content=content,
        target_in_bank=content if manifest.searches else unread,
        further=[item] * len(extra),
        further_parallel=[torch.zeros(1, len(history.numbers)) for history in extra],
        further_content=[content if history.name in with_content else unread for history in extra],
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
        "history": {name: row[name] for name in history if not job.schema.lookup_of_list(name)},
        "candidates": [row[manifest.target_item]],
    }
    return json.dumps(
        request,
        indent=1,  # times become text, decimal numbers become floats
        default=lambda value: float(value) if isinstance(value, Decimal) else str(value),
    )
