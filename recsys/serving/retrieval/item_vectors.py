"""Item vectors: what `recsys export-vectors` writes and `recsys retrieve` reads.

`vectors.npy`, `items.parquet` and `index.faiss`, a FAISS index of dot products (extra `retrieve`),
have the same order. `queries/` is the package of the user tower, which computes query vectors.
Shapes: I items, V width of a vector, Q queries, K results, L levels of codes.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.build import Job
from recsys.content.vectors import ContentVectors
from recsys.distributed.ranks import Ranks
from recsys.evaluation.retrieval import catalogue_of
from recsys.extras import require_extra
from recsys.model.tables import pooled_features
from recsys.ranking.generative import (
    MAX_BEAMS,
    CodeDecoder,
    CodeTrie,
    Generative,
    add_codes,
    beam_search,
)
from recsys.ranking.settings import GenerativeSettings
from recsys.ranking.two_tower import QueryTower
from recsys.ranking.vectors import IDVectors
from recsys.serving.export import load_for_export, write_package
from recsys.serving.package import GRAPH, BaseManifest, Manifest, write_manifest
from recsys.serving.ranking_graph import CandidateBatch
from recsys.serving.requests import request_columns
from recsys.serving.retrieval.catalogue import ItemVectors, VectorKind, item_vectors, raw_ids, unit
from recsys.serving.scorer import Scorer
from recsys.storage.files import atomic_folder

logger = logging.getLogger(__name__)


class QueryVectors(nn.Module):
    """Query vectors of the first label, from `num_pooled` pooled vectors and F dense features."""

    places: Tensor

    def __init__(self, towers: QueryTower, num_pooled: int, num_dense: int) -> None:
        super().__init__()
        self.towers, self.num_pooled, self.num_dense = towers, num_pooled, num_dense
        self.register_buffer("places", torch.tensor(towers.dense, dtype=torch.int64), False)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: CandidateBatch
    ) -> Tensor:  # [N, V]
        """Return the query of each row, which does not depend on the ranked item."""
        by_index = dict(zip(self.towers.pooled, ids.pooled, strict=True))
        unread = batch.dense_features.new_zeros(0)
        pooled = [by_index.get(index, unread) for index in range(self.num_pooled)]
        dense = batch.dense_features.new_zeros(ids.target.shape[0], self.num_dense)
        dense = dense.index_copy(1, self.places, batch.dense_features)
        rows = replace(batch, dense_features=dense)
        ids = replace(ids, pooled=pooled)
        if isinstance(self.towers, Generative):  # without its decoder
            means = self.towers.means(rows)  # type: ignore[arg-type]
            return self.towers.user(ids, content, rows, means)  # type: ignore[arg-type]
        return self.towers(ids, content, rows).query[:, 0]


def write_user_tower(run: Path, job: Job, folder: Path) -> Manifest:
    """Write the package of the user tower of a retrieval model into an empty folder."""
    towers, extra = job.em3.ranking, job.em3.further_histories
    if not isinstance(towers, QueryTower):
        raise ValueError(
            f"{run}: ranking.name is '{job.config.ranking.name}', which has no user tower; give a "
            "run of two_tower or generative, or --vectors content"
        )
    pooled, dense = pooled_features(job.config.embedding, job.schema), job.schema.of_kind("dense")
    num_pooled = len(pooled) + (0 if extra is None else len(extra.widths))
    return write_package(
        run,
        job,
        folder,
        ranking=QueryVectors(towers, num_pooled, len(dense)),
        pooled=[pooled[index] for index in towers.pooled if index < len(pooled)],
        dense=[dense[index] for index in towers.dense],
        reads_targets=False,
    )


class UserTower(Scorer):
    """Computes query vectors from the package of a user tower; threads may share one."""

    def columns(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return columns of user and history that a query reads; looked-up ones if in `names`."""
        schema, manifest = self.schema, self.manifest
        user, history = request_columns(schema, manifest.pooled, manifest.dense)
        return (
            [name for name in user if name in names or not schema.lookup_of(name)],
            [name for name in history if name in names or not schema.lookup_of_list(name)],
        )

    def query(
        self, user: Mapping[str, Any], history: Mapping[str, Sequence[Any]] | Sequence[Any] = ()
    ) -> np.ndarray:  # float32 [V]
        """Return the query of a user, whose dot product with an item's vector ranks the item."""
        rows = replace(self.read(user, history, []), target=np.zeros(1, np.int64))
        return self._run(rows).numpy()[0]


IndexKind = Literal["flat", "ivf", "hnsw"]

HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 128, 128
IVF_READ, IVF_READ_PER_RESULT = 2000, 40  # least items in probed clusters: in all, per result
IVF_CLUSTERS, IVF_PROBED = 4.0, 1 / 16  # clusters per root of I; share of them that is probed
IVF_TRAINED_ON = 64  # vectors per cluster


def require_faiss() -> Any:
    """Import FAISS; a ValueError says how to install it."""
    require_extra("retrieve", "an index of vectors", "faiss")
    import faiss

    return faiss


def build_index(vectors: np.ndarray, kind: IndexKind) -> Any:  # float32 [I, V]
    """Build an index by dot product: of all vectors, of clusters, or a graph of neighbours."""
    faiss = require_faiss()
    num_items, dim = vectors.shape
    clusters = max(1, min(int(IVF_CLUSTERS * math.sqrt(num_items)), num_items))
    names = {"flat": "Flat", "hnsw": f"HNSW{HNSW_LINKS}", "ivf": f"IVF{clusters},Flat"}
    index = faiss.index_factory(dim, names[kind], faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    elif kind == "ivf":
        index.cp.min_points_per_centroid = 1
        sample = np.random.default_rng(0).permutation(num_items)[: clusters * IVF_TRAINED_ON]
        index.train(vectors[np.sort(sample)])
        index.nprobe = math.ceil(clusters * IVF_PROBED)
    index.add(vectors)
    return index


def search_index(
    index: Any, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:  # float32 [Q, V] -> float32 [Q, K], int64 [Q, K]
    """Return the highest dot products of each query and the items' positions; -1: none found."""
    parameters = None  # wider searches for more results
    if hasattr(index, "hnsw"):
        parameters = require_faiss().SearchParametersHNSW(efSearch=max(HNSW_SEARCH, count))
    elif hasattr(index, "nprobe"):
        min_probes = max(IVF_READ, IVF_READ_PER_RESULT * count) / index.ntotal * index.nlist
        probes = min(max(index.nprobe, math.ceil(min_probes)), index.nlist)
        parameters = require_faiss().SearchParametersIVF(nprobe=probes)
    queries = np.ascontiguousarray(queries, np.float32)
    return index.search(queries, min(count, index.ntotal), params=parameters)


class CodeIndex:
    """Searches items by their codes, by the methods of a FAISS index that a retriever calls.

    A query is a user's state, a score the decoder's log-probability; `table` is int64 [I, L + 2].
    """

    def __init__(self, decoder: CodeDecoder, table: np.ndarray, beam_size: int) -> None:
        self.decoder, self.beam_size = decoder.eval(), beam_size
        self.trie = CodeTrie(table)

    @property
    def ntotal(self) -> int:
        return len(self.trie)

    def search(
        self, queries: np.ndarray, count: int, params: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:  # float32 [Q, V] -> float32 [Q, K], int64 [Q, K]
        width = max(count, self.beam_size)
        results = [
            beam_search(self.decoder, self.trie, states, width)
            for states in torch.from_numpy(queries).split(max(1, MAX_BEAMS // width))
        ]
        scores, positions = (torch.cat(blocks)[:, :count].numpy() for blocks in zip(*results))
        return scores, positions

    def trie_with(self, codes: np.ndarray) -> CodeTrie:  # int64 [N, L]
        """Return a trie with more items; too many items that share all codes are a ValueError."""
        table, limit = add_codes(self.trie.table, codes), self.decoder.codes.shape[1]
        if table[:, -1].max(initial=0) > limit:
            raise ValueError(
                f"more than {limit} items share all their codes; train with more ranking.num_codes"
            )
        return CodeTrie(table)


def write_decoder(folder: Path, model: Generative, settings: GenerativeSettings) -> dict[str, int]:
    """Write the decoder; return its sizes and the width of a search, for a manifest."""
    state = {name: value.contiguous() for name, value in model.decoder.state_dict().items()}
    save_file(state, folder / DECODER)
    return {
        "dim": settings.sequence_dim,
        "heads": settings.sequence_heads,
        "layers": settings.decoder_layers,
        "levels": settings.code_levels,
        "codes": settings.num_codes,
        "beam_size": settings.beam_size,
    }


VECTORS, ITEMS, INDEX, QUERIES = "vectors.npy", "items.parquet", "index.faiss", "queries"
DECODER = "decoder.safetensors"


@dataclass
class VectorsManifest(BaseManifest):
    """Contents of a folder of item vectors."""

    contents, command = "folder of item vectors", "recsys export-vectors"
    run: str
    ranking: str
    vectors: VectorKind
    num_items: int
    dim: int
    target_item: str
    history: str | None
    index: IndexKind | None
    normalized: bool  # vectors in the index have length one, so that it compares cosines
    tower: dict[str, Any] = field(default_factory=dict)  # size and hashes of the tower's graph
    decoder: dict[str, int] = field(default_factory=dict)  # sizes of the decoder of codes
    blend: dict[str, Any] = field(default_factory=dict)  # decay, weights and widths of its parts


def load_index(folder: Path, manifest: VectorsManifest, vectors: np.ndarray) -> Any:
    """Load a FAISS index, or one of codes; a missing FAISS or unreadable file is a ValueError."""
    if manifest.vectors == "codes":
        sizes = {name: size for name, size in manifest.decoder.items() if name != "beam_size"}
        decoder = CodeDecoder(**sizes)
        decoder.load_state_dict(load_file(folder / DECODER))
        return CodeIndex(decoder, np.array(vectors), manifest.decoder["beam_size"])
    faiss, path = require_faiss(), folder / INDEX
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read by FAISS ({error}); export it again") from error


def export_vectors(
    run: Path,
    out: Path,
    kind: VectorKind | None,
    index: IndexKind | None,
    ranks: Ranks,
    data: str | None = None,
    blend: bool = False,
) -> VectorsManifest:
    """Write the vectors of all items of a run's best model; they appear whole or not at all.

    The arguments are those of `recsys export-vectors`, and `ranks` is a single process. A run that
    is not finished or has no such vectors is a ValueError, as is a missing FAISS.
    """
    if index is not None:
        require_faiss()
    job = load_for_export(run, out, ranks, data)
    model, settings = job.em3.ranking, job.config.ranking
    tower_kind: VectorKind = "codes" if isinstance(model, Generative) else "item_tower"
    if kind is None:
        kind = tower_kind if isinstance(model, QueryTower) else "content"
    if kind not in ("content", tower_kind) or (kind == "codes" and index is not None):
        raise ValueError(
            f"{run}: --vectors {kind} --index {index}: generative has codes, which need no index, "
            "and two_tower has item_tower; leave both out"
        )
    if blend and (kind != "item_tower" or index is None):
        raise ValueError(
            f"{run}: --blend true --vectors {kind} --index {index}: vectors of item_tower with an "
            "index are blended; give a run of two_tower, and --index flat or hnsw"
        )
    tower: dict[str, Any] = {}
    with atomic_folder(out) as partial:
        if kind != "content":
            (partial / QUERIES).mkdir()
            tower = write_user_tower(run, job, partial / QUERIES).files[GRAPH]
        manifest = _write(partial, run, job, kind, index, blend)
        manifest.tower = tower
        if kind == "codes":
            assert isinstance(model, Generative) and isinstance(settings, GenerativeSettings)
            manifest.decoder = write_decoder(partial, model, settings)
        write_manifest(partial, manifest, excluded=QUERIES)
    return manifest


def _write(
    folder: Path, run: Path, job: Job, kind: VectorKind, index: IndexKind | None, blend: bool
) -> VectorsManifest:
    items, blended = _blended_vectors(folder, run, job) if blend else (item_vectors(job, kind), {})
    num_items, dim = items.vectors.shape
    np.save(folder / VECTORS, items.vectors)
    pq.write_table(pa.table({"id": items.ids, "row": items.rows}), folder / ITEMS)
    manifest = VectorsManifest(
        run=str(run),
        ranking=job.config.ranking.name,
        vectors=kind,
        num_items=num_items,
        dim=dim,
        target_item=job.schema.target_item,
        history=job.schema.history,
        index=index,
        normalized=kind == "content",
        blend=blended,
    )
    if index is not None:
        faiss = require_faiss()
        vectors = unit(items.vectors) if manifest.normalized else items.vectors
        faiss.write_index(build_index(vectors, index), str(folder / INDEX))
        manifest.versions["faiss"] = faiss.__version__
    return manifest


def _blended_vectors(folder: Path, run: Path, job: Job) -> tuple[ItemVectors, dict[str, Any]]:
    """Write the neighbours of a blend; return its vectors, and its entry in the manifest."""
    # These modules import SciPy, which no other vectors need.
    from recsys.serving.retrieval.baselines import blend_to_serve
    from recsys.serving.retrieval.served_blend import ServedBlend

    catalogue, blend = blend_to_serve(run, job)
    served, vectors = ServedBlend.make(catalogue, blend)
    served.write(folder)
    logger.info("blend: decay %s, weights %s", blend.decay, dict(blend.weights))
    entry = {"decay": served.decay, "weights": served.weights, "widths": served.widths}
    return ItemVectors(np.asarray(catalogue_of(job)), raw_ids(job), vectors), entry
