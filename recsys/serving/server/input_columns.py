"""Input columns that a package accepts, as tensors by name or as JSON, and their limits.

Shapes: N candidates, L events of a history, K values of a list.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from recsys.config.server import ServerSettings
from recsys.data.parquet.values import is_list
from recsys.serving.requests import request_columns
from recsys.serving.scorer import Scorer
from recsys.serving.server.protocol import NamedTensor, RequestError


class ScoreArguments(NamedTuple):
    """Arguments of `Scorer.score`."""

    user: Mapping[str, Any]
    history: Mapping[str, Any] | Sequence[Any]
    candidates: Mapping[str, Sequence[Any]] | Sequence[Any]


class InputColumns:
    """Input columns that a package accepts; the values of an example request show their types."""

    def __init__(self, scorer: Scorer, example: Mapping[str, Any]) -> None:
        schema, manifest = scorer.schema, scorer.manifest
        types = scorer.feature_types.values()
        self.types = {field.name: field.type for fields in types for field in fields}
        self.schema, self.item = schema, schema.target_item
        self.user, self.history = request_columns(schema, manifest.pooled, manifest.dense)
        self.of_items = [name for name in self.user if schema.is_of_items(name)]
        self.example = {**example.get("user", {}), **example.get("history", {})}
        self.example[self.item] = next(iter(example.get("candidates", ())), None)
        lists = [name for name in manifest.pooled if schema.columns[name].kind == "ids"]
        self.lists = {
            name
            for name in self.user
            if isinstance(self.example.get(name), list)
            or is_list(self.types.get(name, pa.null()))
            or (self.example.get(name) is None and name in schema.file_columns(lists))
        }

    def metadata(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of each input, as the protocol's metadata has them."""
        names = dict.fromkeys([self.item, *self.user, *self.history])
        return [{"name": name, "datatype": self._datatype(name), "shape": [-1]} for name in names]

    def _datatype(self, name: str) -> str:
        value = self.example.get(name)
        value = next(iter(value), None) if isinstance(value, list) else value
        if value is not None:
            return {bool: "BOOL", int: "INT64", float: "FP32"}.get(type(value), "BYTES")
        if (kind := self.types.get(name)) is not None:
            kind = kind.value_type if is_list(kind) else kind
            if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
                return "BOOL" if pa.types.is_boolean(kind) else "INT64"
            return "FP32" if pa.types.is_floating(kind) else "BYTES"
        column = self.schema.columns.get(name)
        table = name if column is None else self.schema.table_of(name)
        if (id_type := self.schema.id_types.get(table)) is not None:
            return {"string": "BYTES", "integer": "INT64", "boolean": "BOOL"}[id_type.name]
        return "FP32" if column is None or column.kind == "dense" else "INT64"

    def arguments(self, tensors: Iterable[NamedTensor]) -> ScoreArguments:
        """Return tensors by column as arguments of a scorer; a RequestError if one does not fit.

        The item's tensor has the candidates, [N]; histories are [L]. A column of single values is
        [1] for the user or [N] for the candidates; one of lists [K], or [N, K] for the candidates.
        """
        by_name: dict[str, NamedTensor] = {}
        for tensor in tensors:
            if by_name.setdefault(tensor.name, tensor) is not tensor:
                raise RequestError(f"input '{tensor.name}': is given twice")
        if self.item not in by_name:
            raise RequestError(f"inputs: lack '{self.item}', the candidates")
        for name in (self.item, *self.history):
            shape = by_name[name].shape if name in by_name else (1,)
            if len(shape) > 1 and min(shape) > 1:
                raise RequestError(
                    f"input '{name}': shape {list(shape)}; a request is of one user: give one size"
                )
        items = by_name.pop(self.item).values
        history = {name: by_name.pop(name).values for name in self.history if name in by_name}
        user, candidates = dict[str, Any](), {self.item: items}
        for name, tensor in by_name.items():
            _require_column(name, self.user, "inputs")
            shape, values = tensor.shape, tensor.values
            if name in self.lists:
                rows, width = shape if len(shape) == 2 else (1, *shape)
                values = [values[row * width : (row + 1) * width] for row in range(rows)]
            if len(values) == 1 and not (name in self.of_items and len(items) == 1):
                user[name] = values[0]
            elif len(values) == len(items):
                candidates[name] = values
            else:
                raise RequestError(
                    f"input '{name}': shape {list(shape)} for {len(items)} candidates"
                )
        return ScoreArguments(user, history, candidates)

    def check(self, arguments: ScoreArguments, limits: ServerSettings) -> None:
        """Require columns of the package and sizes within the limits; a RequestError names them."""
        user, history, candidates = arguments
        if not isinstance(candidates, Mapping):
            candidates = {self.item: candidates}
        events = history if isinstance(history, Mapping) else {"items": history}
        for name, value in user.items():
            _require_column(name, self.user, "user")
            _check_size(f"user: '{name}'", [value], 1, limits)
        for name, values in events.items():
            if isinstance(history, Mapping):
                _require_column(name, self.history, "history")
            _check_size(f"history: '{name}'", values or [], limits.max_history, limits)
        for name, values in candidates.items():
            _require_column(name, [self.item, *self.user], "candidates")
            _check_size(f"candidates: '{name}'", values, limits.max_candidates, limits)


def _require_column(name: str, columns: Sequence[str], origin: str) -> None:
    if name not in columns:
        raise RequestError(f"{origin}: '{name[:99]}' is none of the columns {list(columns)}")


def _check_size(origin: str, values: Sequence[Any], limit: int, limits: ServerSettings) -> None:
    """Require at most `limit` values, and lists and strings in them within the limits."""
    if len(values) > limit:
        raise RequestError(f"{origin} has {len(values)} values; the limit is {limit}")
    if not {str, list} & set(map(type, values)):  # skips the loop, as slow as parsing the request
        return
    for value in values:
        if isinstance(value, str) and len(value) > limits.max_text:
            raise RequestError(
                f"{origin} has a text of {len(value)} characters; the limit is {limits.max_text}"
            )
        if isinstance(value, list):
            _check_size(origin, value, limits.max_values, limits)
