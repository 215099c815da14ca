"""Retrieves items for the requests of files: rows of Parquet files, or JSON.

Shapes: V width of a vector.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.parquet.file import column_type, open_parquet
from recsys.serving.retrieval.retriever import NoQueryError, Retriever
from recsys.storage.files import whole_file
from recsys.storage.location import Location
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

REQUESTS_PER_BLOCK = 1024

PlacedRequest = tuple[str, Any, Any]  # place for messages, user, history


def retrieve_files(
    retriever: Retriever, inputs: Sequence[str], count: int, out: Path | None = None
) -> int:
    """Retrieve items for each request, in their order; return the number of requests.

    `inputs` are Parquet files or folders of them, a request per row, or JSON files.
    `out` is a Parquet file of `items` and `scores`; None prints a line of JSON per request.
    A history without content vectors gets an empty list.
    """
    requests = itertools.chain.from_iterable(_requests(name, retriever) for name in inputs)
    blocks = _retrieved(retriever, requests, count)
    if out is None:
        total = 0
        for row in itertools.chain.from_iterable(blocks):
            print(json.dumps(row))
            total += 1
        return total
    check_output(out, [Location.of(name) for name in inputs])
    out.parent.mkdir(parents=True, exist_ok=True)
    types = {"items": pa.list_(retriever.ids.type), "scores": pa.list_(pa.float32())}
    with whole_file(out) as partial, pq.ParquetWriter(partial, pa.schema(types)) as writer:
        total = 0
        for block in blocks:
            writer.write_table(pa.Table.from_pylist(block, pa.schema(types)))
            total += len(block)
    return total


def _retrieved(
    retriever: Retriever, requests: Iterator[PlacedRequest], count: int
) -> Iterator[list[dict[str, list[Any]]]]:
    num_empty = 0
    while block := list(itertools.islice(requests, REQUESTS_PER_BLOCK)):
        rows: list[dict[str, list[Any]]] = [{"items": [], "scores": []} for _ in block]
        queries: dict[int, np.ndarray] = {}  # [V] by place in the block
        for number, (place, user, history) in enumerate(block):
            try:
                queries[number] = retriever.query(user, history)
            except NoQueryError:
                num_empty += 1
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        matches = retriever.search(np.stack([*queries.values()]), count) if queries else []
        for number, result in zip(queries, matches, strict=True):
            rows[number] = {"items": result.items, "scores": result.scores.tolist()}
        yield rows
    if num_empty:
        logger.warning(
            "%s requests have no history item with a content vector; their lists are empty",
            f"{num_empty:,}",
        )


def _requests(name: str, retriever: Retriever) -> Iterator[PlacedRequest]:
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
            number = 0
            for batch in parquet.iter_batches(REQUESTS_PER_BLOCK, columns=columns):
                for row in batch.to_pylist():
                    values = {name: row[name] for name in user}
                    lists = {name: row[name] for name in history}
                    yield f"{file} row {number}", values, lists
                    number += 1


def _json_requests(file: Location) -> Iterator[PlacedRequest]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON ({error})") from error
    for number, request in enumerate(content if isinstance(content, list) else [content]):
        place = f"{file} request {number}"
        if not isinstance(request, dict):
            raise ValueError(f"{place}: is no object; give one with `user` and `history`")
        yield place, request.get("user", {}), request.get("history", [])
