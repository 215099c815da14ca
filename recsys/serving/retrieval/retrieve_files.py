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

from recsys.data.filesystem import Location, whole_file
from recsys.data.parquet.file import column_type, open_parquet
from recsys.serving.retrieval.retriever import NoQueryError, Retrieved, Retriever
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)

REQUESTS_PER_BLOCK = 1024

PlacedRequest = tuple[str, Any, Any]  # place for messages, user, history


def retrieve_files(
    retriever: Retriever, inputs: Sequence[str], count: int, out: Path | None = None
) -> int:
    """Retrieve items for each request, in their order; return the number of requests.

    `inputs` are Parquet files with a request in each row, or folders of them; or JSON files with
    one request (`user` and `history`) or a list of them. `out` is a Parquet file with columns
    `items` and `scores`; None prints a line of JSON for each request. A request without a history
    item that has a content vector gets an empty list.
    """
    requests = itertools.chain.from_iterable(_requests(name, retriever) for name in inputs)
    if out is None:
        total = 0
        for block in _retrieved(retriever, requests, count):
            total += len(block)
            for result in block:
                print(json.dumps({"items": result.items, "scores": result.scores.tolist()}))
        return total
    check_output(out, [Location.of(name) for name in inputs])
    out.parent.mkdir(parents=True, exist_ok=True)
    types = {"items": pa.list_(retriever.ids.type), "scores": pa.list_(pa.float32())}
    total = 0
    with whole_file(out) as partial, pq.ParquetWriter(partial, pa.schema(types)) as writer:
        for block in _retrieved(retriever, requests, count):
            total += len(block)
            columns = {
                "items": [result.items for result in block],
                "scores": [result.scores for result in block],
            }
            writer.write_table(pa.table(columns, pa.schema(types)))
    return total


def _retrieved(
    retriever: Retriever, requests: Iterator[PlacedRequest], count: int
) -> Iterator[list[Retrieved]]:
    no_match = Retrieved([], np.zeros(0, np.float32))
    num_empty = 0
    while block := list(itertools.islice(requests, REQUESTS_PER_BLOCK)):
        queries: list[np.ndarray | None] = []  # [V] each
        for place, user, history in block:
            try:
                queries.append(retriever.query(user, history))
            except NoQueryError:
                queries.append(None)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        vectors = [query for query in queries if query is not None]
        matches = iter(retriever.search(np.stack(vectors), count) if vectors else [])
        num_empty += len(block) - len(vectors)
        yield [no_match if query is None else next(matches) for query in queries]
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
    user, history = retriever.columns
    columns = list(dict.fromkeys([*user, *history]))
    for file in files:
        with open_parquet(file) as parquet:
            for column in columns:
                column_type(parquet, file, column)
            number = 0
            for batch in parquet.iter_batches(REQUESTS_PER_BLOCK, columns=columns):
                for row in batch.to_pylist():
                    parts = ({name: row[name] for name in names} for names in (user, history))
                    yield f"{file} row {number}", *parts
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
