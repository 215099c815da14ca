"""Writes `schema.yaml` of a dataset made of events."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa
import yaml

from recsys.data.events.output.vocabularies import id_lists
from recsys.data.events.settings import EventsConfig
from recsys.data.schema_columns import Column


def schema_text(config: EventsConfig, sizes: dict[str, int], lists: dict[str, pa.DataType]) -> str:
    """Return the text of `schema.yaml`, with the rows of each id table in `sizes`.

    Histories are sequences of items; lists of ids beside them have tables of their own.
    """
    output = config.output
    columns = {name: _id(config, "id", sizes[name]) for name in (output.user, output.item)}
    for name, history in config.histories.items():
        parallel = list(history.parallel)
        columns[name] = {"kind": "sequence", "shares": output.item, "parallel": parallel}
    for name in id_lists(config, lists):
        columns[name] = _id(config, "ids", sizes[name])
    for name, feature in config.features.items():
        is_id = feature.kind != "dense"
        columns[name] = _id(config, feature.kind, sizes[name]) if is_id else {"kind": "dense"}
    columns |= {name: {"kind": "dense"} for name in config.counts}
    columns |= {name: {"kind": "label"} for name in config.labels}
    if config.negatives is not None:
        columns[output.sampled] = {"kind": "sampled"}
    columns |= {name: _plain(column) for name, column in config.transforms.items()}
    schema: dict[str, Any] = {"target_item": output.item, "group": output.user, "columns": columns}
    if config.items is not None:
        content = {name: {"kind": of.kind} for name, of in config.items.content.items()}
        schema["items"] = {"id": output.item, "columns": content}
    return yaml.safe_dump(schema, sort_keys=False, default_flow_style=None)


def _plain(column: Column) -> dict[str, Any]:
    return {name: of for name, of in asdict(column).items() if of not in (None, [])}


def _id(config: EventsConfig, kind: str, size: int) -> dict[str, Any]:
    """Return a column of ids with a table of its own."""
    column: dict[str, Any] = {"kind": kind, "num_embeddings": size}
    if config.vocabulary.kind == "exact":
        column["vocabulary"] = {"kind": "exact"}
    return column
