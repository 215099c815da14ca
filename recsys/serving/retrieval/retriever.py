"""Retriever: the items that suit a user best among all, from a folder of item vectors.

Shapes: K results, Q queries, V width of a vector.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.parquet.file import column_type, open_parquet, read_row_group
from recsys.serving.package import GRAPH, read_manifest_of
from recsys.serving.requests import Values, value_list
from recsys.serving.retrieval.catalogue import unit
from recsys.serving.retrieval.item_vectors import (
    ITEMS,
    QUERIES,
    VECTORS,
    CodeIndex,
    UserTower,
    VectorsManifest,
    load_index,
    search_index,
)
from recsys.serving.retrieval.semantic_ids import read_codes
from recsys.storage.files import atomic_file
from recsys.storage.location import Location, errors_at
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

History = Mapping[str, Sequence[Any]] | Sequence[Any]


class NoQueryError(ValueError):
    """No item of a history has a vector, so that there is no mean as a query."""


@dataclass(frozen=True)
class Retrieved:
    """Items of one request, best first, and their scores.

    Example::

        from recsys.serving.retrieval import Retrieved, Retriever

        history = {"history": ["item 3", "item 12"], "history_liked": [1.0, 0.0]}
        retriever = Retriever.load("vectors")
        retrieved: Retrieved = retriever.retrieve({"user": 7, "price": 0.5}, history, count=10)
        dict(zip(retrieved.items, retrieved.scores))  # dot product by raw id
    """

    items: list[Any]  # raw ids [K]
    scores: np.ndarray  # float32 [K] dot products, or log-probabilities of a generative model


class Retriever:
    """Retrieves items for a user, from what `recsys export-vectors` wrote.

    The query is the user tower's, or the mean of the unit content vectors of the history.
    Several threads may call it at once.

    Example::

        from recsys.serving.retrieval import Retriever

        retriever = Retriever.load("vectors")
        history = {"history": ["item 3", "item 12"], "history_liked": [1.0, 0.0]}
        retriever.retrieve({"user": 7, "price": 0.5}, history, count=10).items  # 10 raw ids
    """

    def __init__(self, folder: Path, manifest: VectorsManifest, verify: bool) -> None:
        self.folder, self.manifest = folder, manifest
        self.ids = pq.read_table(folder / ITEMS, partitioning=None)["id"].combine_chunks()
        self.vectors = np.load(folder / VECTORS, mmap_mode="r")
        self._index = load_index(folder, manifest, self.vectors)
        self._history = manifest.history or manifest.target_item
        self._blend: Any = None
        if manifest.blend:
            # Imports SciPy, which no other vectors need.
            from recsys.serving.retrieval.served_blend import ServedBlend

            self._blend = ServedBlend.read(folder, **manifest.blend)
        self.tower: UserTower | None = None
        if manifest.vectors != "content":
            self.tower = UserTower.load(folder / QUERIES, verify=verify)
            if self.tower.manifest.files[GRAPH] != manifest.tower:
                raise ValueError(
                    f"{folder / QUERIES / GRAPH}: is not the tower of these vectors; export the "
                    "vectors again"
                )

    @staticmethod
    def load(folder: str | Path, verify: bool = True) -> Retriever:
        """Load a folder with an index; compare the hashes of its files, or only their sizes."""
        folder = Path(folder).resolve()  # a link may be replaced meanwhile
        manifest = read_manifest_of(VectorsManifest, folder, verify)
        if manifest.index is None and manifest.vectors != "codes":
            raise ValueError(f"{folder}: has no index; export the vectors with --index hnsw")
        return Retriever(folder, manifest, verify)

    def retrieve(
        self, user: Values, history: History = (), count: int = 100, exclude: Sequence[Any] = ()
    ) -> Retrieved:
        """Return the `count` best items for a user, or fewer if the index yields fewer.

        Args:
            user: values of the columns that the user tower reads; content vectors need none.
            history: the user's items, oldest first; with parallel lists: each list by its column.
            count: most items to return, K.
            exclude: raw ids not to return, such as items that the user knows.

        Raises:
            ValueError: names a missing or unusable column; or no history item has a content vector.
        """
        query = self.query(user, history)[np.newaxis]
        return self.search(query, count, [exclude], [history])[0]

    def add_items(self, folder: str | Path) -> int:
        """Make new items retrievable by a generative model; return their number.

        `folder`, by `recsys semantic-ids --codebooks`, has the codes of new and known items.
        """
        if not isinstance(self._index, CodeIndex):
            raise ValueError(
                f"{self.folder}: items are added by their codes to a generative model alone; "
                "export the vectors of the new items, too"
            )
        ids, codes = read_codes(Path(folder), self.ids.type)
        indices = pc.index_in(ids, self.ids)
        is_new = indices.is_null().to_numpy(zero_copy_only=False)
        existing_codes = self._index.trie.table[indices.drop_null().to_numpy(), :-2]
        is_same_shape = len(existing_codes) > 0 and existing_codes.shape[1] == codes.shape[1]
        if not is_same_shape or (existing_codes != codes[~is_new]).any():
            raise ValueError(
                f"{folder}: its codes are not those of {self.folder}, or of none of its items; "
                "write those of all items with --codebooks of the semantic ids that the model was "
                "trained on"
            )
        trie = self._index.trie_with(codes[is_new])
        # The ids first: a search of another thread may find the new indices at once.
        self.ids = pa.concat_arrays([self.ids, ids.filter(pa.array(is_new))])
        self._index.trie = trie
        return int(is_new.sum())

    def columns(self, given: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the file columns of user and history that a request gives."""
        return ([], [self._history]) if self.tower is None else self.tower.columns(given)

    def query(self, user: Values, history: History = ()) -> np.ndarray:  # float32 [V]
        """Return the vector by which a user's items are searched; see `retrieve`."""
        if self.tower is not None:
            query = self.tower.query(user, history)
            if self._blend is not None:
                query = self._blend.query(query, self._indices(history), self.vectors)
            return query
        indices = self._indices(history)
        if not len(indices := indices[indices >= 0]):
            raise NoQueryError(
                f"history: no item of '{self._history}' has a vector in {self.folder}, and the "
                "query is their mean; give items that it has"
            )
        mean: np.ndarray = unit(self.vectors[indices]).mean(axis=0)
        return mean

    def _indices(self, history: History) -> np.ndarray:  # int64 [H], -1: an item without a vector
        name = self._history
        items = history.get(name) if isinstance(history, Mapping) else history
        items = value_list({name: () if items is None else items}, name, "history")
        with errors_at(f"history: column '{name}'", pa.ArrowException, TypeError, OverflowError):
            item_ids = pa.array(items, self.ids.type)
        indices: np.ndarray = pc.index_in(item_ids, self.ids).fill_null(-1).to_numpy()
        return indices.astype(np.int64)

    def search(
        self,
        queries: np.ndarray,
        count: int,
        exclude: Iterable[Sequence[Any]] | None = None,
        histories: Sequence[History] | None = None,
    ) -> list[Retrieved]:  # float32 [Q, V] -> Q results
        """Return the best items of each query, except raw ids in its list of `exclude`.

        A blend also reads the `histories` of the queries.
        """
        if count < 1:
            raise ValueError(f"count is {count}; ask for at least one item")
        if self._blend is not None and histories is None:
            raise ValueError(f"{self.folder}: a blend is searched with histories; give them, too")
        with errors_at("exclude", pa.ArrowException, TypeError, OverflowError):
            excluded = [self._excluded(ids) for ids in exclude or [()] * len(queries)]
        depth = count + max(map(len, excluded), default=0)
        matches = search_index(self._index, queries, depth)
        results = []
        for row, (scores, indices, excluded_ids) in enumerate(zip(*matches, excluded, strict=True)):
            scores, indices = scores[indices >= 0], indices[indices >= 0]
            if self._blend is not None:
                assert histories is not None
                history = self._indices(histories[row])
                scores, indices = self._blend.search(queries[row], history, indices, self.vectors)
                scores, indices = scores[:depth], indices[:depth]
            ids = self.ids.take(pa.array(indices)).to_pylist()
            best = [rank for rank, item in enumerate(ids) if item not in excluded_ids][:count]
            results.append(Retrieved([ids[rank] for rank in best], scores[best]))
        return results

    def _excluded(self, values: Sequence[Any]) -> set[Any]:
        """Return raw ids in the type of the items; a text is no list, and 7.5 no id."""
        if isinstance(values, str | bytes):
            raise ValueError(f"{values!r} is no list of ids; give [{values!r}]")
        ids = pa.array(list(values), self.ids.type).to_pylist()
        for value, item in zip(values, ids, strict=True):
            if isinstance(value, float | np.floating) and value != item:  # Arrow cuts 7.5 to 7
                raise ValueError(f"{value} is no id of an item; give whole numbers")
        return set(ids)


REQUESTS_PER_BLOCK = 1024

LocatedRequest = tuple[str, Any, Any]  # location for messages, user, history


def retrieve_files(
    retriever: Retriever, inputs: Sequence[str], count: int, out: Path | None = None
) -> int:
    """Retrieve items for each request, in their order; return the number of requests.

    `inputs` are Parquet files or folders of them, a request per row, or JSON files.
    `out` is a Parquet file of `items` and `scores`; None prints a line of JSON per request.
    A history without content vectors gets an empty list.
    """
    requests = itertools.chain.from_iterable(_requests(name, retriever) for name in inputs)
    blocks, total = _retrieved(retriever, requests, count), 0
    if out is None:
        for row in itertools.chain.from_iterable(blocks):
            print(json.dumps(row))
            total += 1
        return total
    check_output(out, [Location.of(name) for name in inputs])
    out.parent.mkdir(parents=True, exist_ok=True)
    types = pa.schema({"items": pa.list_(retriever.ids.type), "scores": pa.list_(pa.float32())})
    with atomic_file(out) as partial, pq.ParquetWriter(partial, types) as writer:
        for block in blocks:
            writer.write_table(pa.Table.from_pylist(block, types))
            total += len(block)
    return total


def _retrieved(
    retriever: Retriever, requests: Iterator[LocatedRequest], count: int
) -> Iterator[list[dict[str, list[Any]]]]:
    num_empty = 0
    while block := list(itertools.islice(requests, REQUESTS_PER_BLOCK)):
        rows: list[dict[str, list[Any]]] = [{"items": [], "scores": []} for _ in block]
        queries: dict[int, np.ndarray] = {}  # [V] by index in the block
        for number, (location, user, history) in enumerate(block):
            try:
                queries[number] = retriever.query(user, history)
            except NoQueryError:
                num_empty += 1
            except ValueError as error:
                raise ValueError(f"{location}: {error}") from error
        if queries:
            histories = [block[number][2] for number in queries]
            matches = retriever.search(np.stack([*queries.values()]), count, histories=histories)
            for number, result in zip(queries, matches, strict=True):
                rows[number] = {"items": result.items, "scores": result.scores.tolist()}
        yield rows
    if num_empty:
        logger.warning(
            f"{num_empty:,} requests have no history item with a content vector; their lists are "
            "empty"
        )


def _requests(name: str, retriever: Retriever) -> Iterator[LocatedRequest]:
    if name.endswith(".json"):
        yield from _json_requests(Location.of(name))
        return
    files = Location.of(name).files(".parquet")
    if not files:
        raise ValueError(f"{name}: no such file, nor a folder with *.parquet files")
    for file in files:
        with open_parquet(file) as parquet:
            user, history = retriever.columns(parquet.schema_arrow.names)
            columns = list(dict.fromkeys([*user, *history]))
            for column in columns:
                column_type(parquet, file, column)
            # By row group, as pyarrow cannot read lists of categories across row groups.
            groups = range(parquet.num_row_groups)
            tables = (read_row_group(parquet, file, group, columns) for group in groups)
            batches = (batch for table in tables for batch in table.to_batches(REQUESTS_PER_BLOCK))
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                values, lists = ({name: row[name] for name in names} for names in (user, history))
                yield f"{file} row {number}", values, lists


def _json_requests(file: Location) -> Iterator[LocatedRequest]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON ({error})") from error
    for number, request in enumerate(content if isinstance(content, list) else [content]):
        location = f"{file} request {number}"
        if not isinstance(request, dict):
            raise ValueError(f"{location}: is no object; give one with `user` and `history`")
        yield location, request.get("user", {}), request.get("history", [])
