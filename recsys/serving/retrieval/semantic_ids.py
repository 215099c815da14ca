"""Semantic ids: a few codes per item, from coarse to fine, that similar items share.

Residual k-means, as in QARM (arXiv 2411.11739), on unit vectors: of content, or of the item tower,
which also reflects who took an item, as in LETTER (arXiv 2405.07314). An item's codes depend on its
vector and the codebooks alone. The folder has `items.parquet`, `codebooks.npy` with the centres
of each level, and `collisions.json`. Shapes: I items, D content dimension, L levels, C codes.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recsys.build import SPLITS, Job
from recsys.checkpoint.files import model_of
from recsys.checkpoint.run_folder import trained_counts
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.events.daily_state import STATE
from recsys.data.parquet.file import open_parquet
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks
from recsys.evaluation.predict import data_of
from recsys.evaluation.retrieval import catalogue_of
from recsys.ranking.two_tower import TwoTower
from recsys.serving.export import load_for_export
from recsys.serving.package import BaseManifest, read_manifest_of, write_manifest
from recsys.serving.retrieval.catalogue import VectorKind, item_vectors, raw_ids, unit
from recsys.serving.retrieval.item_vectors import require_faiss
from recsys.storage.files import atomic_folder, link_or_copy
from recsys.storage.location import Location

logger = logging.getLogger(__name__)

ITERATIONS = 25
BALANCING_ROUNDS, BALANCING_STEPS = 8, 20
TRAINED_ON = 1024  # vectors per code, at most
ITEMS_PER_BLOCK = 4096
SHOWN = 5  # examples of the largest group of items with equal codes
ITEMS, CODEBOOKS, COLLISIONS = "items.parquet", "codebooks.npy", "collisions.json"
PRICES = "prices.npy"
SUCCESS = "_SUCCESS"  # marks a whole partition; `recsys continual` waits for it
COLUMN = "semantic_ids"


@dataclass(frozen=True)
class Codebooks:
    """Centres of each level, and prices, which are penalties that balance the use of codes."""

    centres: np.ndarray  # float32 [L, C, D]
    prices: np.ndarray  # float64 [L, C]; zeros: the nearest centre is chosen
    kind: str = "content"  # of the vectors

    @staticmethod
    def fit(vectors: np.ndarray, levels: int, codes: int, balanced: bool = False) -> Codebooks:
        """Cluster vectors [I, D], at least as many as codes, then the residuals of each level.

        `balanced` gives each code of a level about as many of the vectors.
        """
        _check_codes(codes, len(vectors))
        faiss, residuals, centres, prices = require_faiss(), unit(vectors), [], []
        for _ in range(levels):
            means = faiss.Kmeans(
                residuals.shape[1],
                codes,
                niter=ITERATIONS,
                seed=0,
                min_points_per_centroid=1,
                max_points_per_centroid=TRAINED_ON,
            )
            means.train(np.ascontiguousarray(residuals))
            centres.append(means.centroids.copy())
            prices.append(np.zeros(codes))
            if balanced:
                centres[-1], prices[-1] = _balance(residuals, centres[-1])
            residuals = residuals - centres[-1][_nearest(residuals, centres[-1], prices[-1])]
        return Codebooks(np.stack(centres), np.stack(prices))

    def codes_of(self, vectors: np.ndarray) -> np.ndarray:  # float32 [I, D] -> [I, L] in [0, C)
        residuals, codes = unit(vectors), []
        for centres, prices in zip(self.centres, self.prices, strict=True):
            codes.append(_nearest(residuals, centres, prices))
            residuals = residuals - centres[codes[-1]]
        return np.stack(codes, axis=1)

    def ids_of(self, vectors: np.ndarray) -> np.ndarray:  # float32 [I, D] -> int64 [I, L]
        """Return ids that differ between levels: code + level * C, in [0, L * C)."""
        levels, codes = self.centres.shape[:2]
        return self.codes_of(vectors) + np.arange(levels) * codes


def _check_codes(codes: int, num_items: int) -> None:
    if codes > num_items:
        raise ValueError(
            f"--codes is {codes}, but {num_items:,} items have training rows; set at most that"
        )


def _balance(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move centres [C, D] to the means of groups of about equal size, and find their prices [C].

    Prices are those of Sinkhorn's algorithm at a falling temperature (arXiv 1306.0895).
    """
    from scipy.special import softmax  # other commands start without it

    sample = np.random.default_rng(0).permutation(len(vectors))[: TRAINED_ON * len(centres)]
    sampled, prices = vectors[np.sort(sample)].astype(np.float64), np.zeros(len(centres))
    share = len(sampled) / len(centres)
    for temperature in np.geomspace(0.1, 0.001, BALANCING_ROUNDS):
        centres64 = centres.astype(np.float64)
        gains = sampled @ centres64.T - (centres64**2).sum(axis=1) / 2  # [I, C]
        for _ in range(BALANCING_STEPS):
            shares = softmax((gains - prices) / temperature, axis=1).sum(axis=0)
            prices = prices + temperature * np.log(np.maximum(shares, 1e-9) / share)
        codes = _nearest(sampled, centres, prices)
        counts = np.bincount(codes, minlength=len(centres))
        sums = np.zeros_like(centres64)
        np.add.at(sums, codes, sampled)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres64)
        last, centres = centres, means.astype(np.float32)
    return last, prices  # the prices were found for the centres before the last move


def _nearest(
    vectors: np.ndarray, centres: np.ndarray, prices: np.ndarray
) -> np.ndarray:  # [I, D], [C, D], [C] -> [I]
    centres64 = centres.astype(np.float64)  # a code does not depend on the block
    halves = (centres64**2).sum(axis=1) / 2 + prices
    codes = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), ITEMS_PER_BLOCK):
        block = slice(start, start + ITEMS_PER_BLOCK)
        codes[block] = (vectors[block].astype(np.float64) @ centres64.T - halves).argmax(axis=1)
    return codes


def collision_report(codes: np.ndarray, ids: list[Any], num_codes: int) -> dict[str, Any]:
    """Describe how many items share all codes [I, L]; `perplexity` is the effective code count."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    largest = np.flatnonzero(inverse.reshape(-1) == counts.argmax())
    levels = []
    for level in codes.T:
        shares = np.bincount(level, minlength=num_codes) / len(level)
        shares = shares[shares > 0]
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        levels.append({"codes": num_codes, "used": len(shares), "perplexity": perplexity})
    return {
        "items": len(codes),
        "distinct": len(counts),
        "colliding": int(counts[counts > 1].sum()),
        "largest": int(counts.max()),
        "largest_items": [ids[index] for index in largest[:SHOWN]],
        "levels": levels,
    }


def format_collisions(report: dict[str, Any]) -> str:
    """Format a `collision_report` as text."""
    items = max(report["items"], 1)
    lines = [
        f"items {report['items']:,}; different semantic ids {report['distinct']:,}",
        f"items that share theirs with another: {report['colliding']:,} "
        f"({report['colliding'] / items:.2%}); largest group: {report['largest']:,} items, "
        f"such as {report['largest_items']}",
    ]
    for number, level in enumerate(report["levels"]):
        lines.append(
            f"level {number}: {level['used']} of {level['codes']} codes used, "
            f"perplexity {level['perplexity']:.1f}"
        )
    return "\n".join(lines)


@dataclass
class SemanticManifest(BaseManifest):
    """Contents of a folder of semantic ids."""

    contents, command = "folder of semantic ids", "recsys semantic-ids"
    run: str
    model: str | None  # hash of the model whose vectors were clustered
    target_item: str
    levels: int  # L
    codes: int  # C
    dim: int  # D
    vectors: str = "content"  # or item_tower: what was clustered


def export_semantic_ids(
    run: Path,
    out: Path,
    levels: int,
    codes: int,
    ranks: Ranks,
    data: str | None = None,
    codebooks: Path | None = None,
    dataset: Path | None = None,
    balanced: bool = False,
    vectors: Literal["content", "item_tower"] = "content",
) -> dict[str, Any]:
    """Write semantic ids of all items, fitted to trained ones; return the collision report.

    The arguments are those of `recsys semantic-ids`, and `ranks` is a single process. `codebooks`
    also decide sizes and kind of vectors. A folder that exists, a run without such vectors or with
    too few trained items, codebooks of another model and a missing FAISS are ValueErrors.
    """
    if dataset is not None:
        if dataset.exists():
            raise ValueError(f"{dataset}: exists already; remove it, or name another folder")
        _schema_without(Location.of(data_of(run, data)), COLUMN)
    if codebooks is None:
        require_faiss()
    model = model_of(run)
    books = None if codebooks is None else load_codebooks(codebooks, model)
    kind = vectors if books is None else books.kind
    job = load_for_export(run, out, ranks, data)
    if kind == "item_tower" and not isinstance(job.em3.ranking, TwoTower):
        raise ValueError(
            f"{run}: --vectors item_tower: ranking.name is '{job.config.ranking.name}', which has "
            "no vectors of items; give a run of two_tower, or --vectors content"
        )
    # Items without training rows, as of the test split, came later.
    counts = trained_counts(run, job.schema.item_id_limit)
    is_trained = counts.of(np.asarray(catalogue_of(job))) > 0
    if books is None:
        _check_codes(codes, int(is_trained.sum()))
    items = item_vectors(job, cast(VectorKind, kind))
    books = books or Codebooks.fit(items.vectors[is_trained], levels, codes, balanced=balanced)
    ids, (levels, codes, dim) = books.ids_of(items.vectors), books.centres.shape
    report = collision_report(ids % codes, items.ids.to_pylist(), codes)
    target_item = job.schema.target_item
    table = pa.table({target_item: items.ids, COLUMN: pa.array(list(ids))})
    with atomic_folder(out) as partial:
        pq.write_table(table, partial / ITEMS)
        np.save(partial / CODEBOOKS, books.centres)
        np.save(partial / PRICES, books.prices)
        (partial / COLLISIONS).write_text(json.dumps(report, indent=1) + "\n")
        manifest = SemanticManifest(str(run), model, target_item, levels, codes, dim, kind)
        write_manifest(partial, manifest)
        if dataset is not None:
            write_dataset_with(job.root, job.schema, table, COLUMN, levels * codes, dataset)
    return report


def load_codebooks(folder: Path, model: str | None = None) -> Codebooks:
    """Load the codebooks of a folder of semantic ids, whose model has this hash if one is given."""
    manifest = read_manifest_of(SemanticManifest, folder)
    if model is not None and manifest.model != model:
        raise ValueError(
            f"{folder}: its codebooks are of the model of {manifest.run}, whose vectors "
            "another model does not share; name that run, or leave --codebooks out for new ids"
        )
    centres, file = np.load(folder / CODEBOOKS), folder / PRICES
    prices = np.load(file) if file.exists() else np.zeros(centres.shape[:2])
    return Codebooks(centres, prices, manifest.vectors)


def codes_of_items(job: Job, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the item table [I] and codes [I, L] of a job's items that have some."""
    ids = raw_ids(job)
    coded, codes = read_codes(folder, ids.type)
    positions = pc.index_in(ids, coded)
    has_codes = positions.is_valid().to_numpy(zero_copy_only=False)
    if not has_codes.all():
        logger.warning(
            f"{folder}: {int((~has_codes).sum()):,} of {len(ids):,} items have no semantic ids and "
            "cannot be retrieved; write them by --codebooks for these items, too"
        )
    return np.asarray(catalogue_of(job))[has_codes], codes[positions.drop_null().to_numpy()]


def read_codes(folder: Path, id_type: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Return the raw ids of a folder of semantic ids [I], and their codes [I, L]."""
    manifest = read_manifest_of(SemanticManifest, folder)
    table = pq.read_table(folder / ITEMS, partitioning=None)
    ids = table[manifest.target_item].combine_chunks()
    try:
        ids = ids.cast(id_type)
    except pa.ArrowException as error:
        raise ValueError(f"{folder}: its items have ids of another type ({error})") from error
    return ids, np.stack(table[COLUMN].to_numpy()) % manifest.codes


def write_dataset_with(
    root: Location, schema: Schema, ids: pa.Table, column: str, num_ids: int, out: Path
) -> None:
    """Write a local dataset whose rows also have the ids of their item, whole or not at all.

    `ids` has raw ids of items and lists of ids in [0, num_ids) in `column`; other items get []. The
    column is also looked up by the item: requests may omit it, and no user tower reads it.
    """
    content = _schema_without(root, column)
    content["columns"][column] = {"kind": "ids", "num_embeddings": num_ids}
    with atomic_folder(out) as partial:
        for entry in sorted(Path(root.path).iterdir()):
            if entry.name == STATE:
                continue  # of `prepare events`, which does not know the column
            if entry.is_dir() and entry.name not in SPLITS:
                shutil.copytree(entry, partial / entry.name, copy_function=link_or_copy)
            elif entry.is_file() and entry.name != "schema.yaml":
                link_or_copy(entry, partial / entry.name)
        _add_lookup(content.setdefault("features", []), schema.target_item, ids, column, partial)
        (partial / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        for split in SPLITS:
            folder = root / split
            for file in folder.files(".parquet"):  # partitions have files of equal names
                path = partial / split / Path(file.path).relative_to(folder.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_file(file, path, schema, ids, column)
                if Path(file.path).with_name(SUCCESS).exists():
                    path.with_name(SUCCESS).touch()


def _add_lookup(
    tables: list[dict[str, Any]], item: str, ids: pa.Table, column: str, out: Path
) -> None:
    """Add a column of the item to the tables of `schema.yaml` and to the dataset's last values."""
    table = next((entry for entry in tables if entry["by"] == [item]), None)
    if table is None:
        table = {"by": [item], "columns": []}
        tables.append(table)
    table["columns"] = [*table["columns"], column]
    folder = out / "features" / item
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.rglob("*.parquet"))
    if files:
        values = pq.read_table(folder, partitioning=None)
        stored = values[item].combine_chunks().cast(ids[item].type)
        positions = pc.index_in(stored, ids[item].combine_chunks())
        values = values.append_column(column, ids[column].combine_chunks().take(positions))
        is_missing = pc.invert(pc.is_in(ids[item], stored))
        ids = pa.concat_tables([values, ids.filter(is_missing)], promote_options="permissive")
        for file in files:
            file.unlink()  # a link to the other dataset's file
    pq.write_table(ids, folder / "part-0.parquet")


def _schema_without(root: Location, column: str) -> dict[str, Any]:
    """Return the content of a local dataset's `schema.yaml`, which must not have the column yet."""
    if not root.is_local:
        raise ValueError(f"{root}: is not on a local disk; copy the dataset to one")
    content: dict[str, Any] = load_plain_yaml((root / "schema.yaml").read_bytes())
    if column in content["columns"]:
        raise ValueError(f"{root}/schema.yaml: has a column '{column}' already; remove it")
    return content


def _write_file(file: Location, out: Path, schema: Schema, ids: pa.Table, column: str) -> None:
    items, lists = ids[schema.target_item].combine_chunks(), ids[column].combine_chunks()
    field = pa.field(column, lists.type)
    with (
        open_parquet(file) as parquet,
        pq.ParquetWriter(out, parquet.schema_arrow.append(field)) as writer,
    ):
        for index in range(parquet.num_row_groups):
            rows = parquet.read_row_group(index)
            positions = pc.index_in(rows[schema.target_item].cast(items.type), items)
            row_lists = lists.take(positions.combine_chunks())
            row_lists = pc.if_else(row_lists.is_valid(), row_lists, pa.scalar([], lists.type))
            writer.write_table(rows.append_column(field, row_lists))
