"""Columns of a package: what a request may have, as tensors by name or as JSON, and its sizes.

Shapes: N candidates, L events of a history, K values of a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recsys.config.server import Limits
from recsys.serving.requests import request_columns
from recsys.serving.scorer import Scorer
from recsys.serving.server.protocol.tensors import Tensor
from recsys.serving.server.refusals import Refusal


@dataclass(frozen=True)
class RankedUser:
    """Arguments of `Scorer.score`."""

    user: Mapping[str, Any]
    history: Mapping[str, Any] | Sequence[Any]
    candidates: Mapping[str, Sequence[Any]] | Sequence[Any]


class Columns:
    """Columns that requests to a package have.

    Args:
        scorer: the package.
        example: a request for it, whose values show their types.
    """

    def __init__(self, scorer: Scorer, example: Mapping[str, Any]) -> None:
        """List the columns."""
        schema, manifest = scorer.schema, scorer.manifest
        self.schema, self.item = schema, schema.target_item
        self.user, self.history = request_columns(schema, manifest.pooled, manifest.dense)
        self.example = {**example.get("user", {}), **example.get("history", {})}
        self.example[self.item] = next(iter(example.get("candidates", ())), None)
        of_ids = [name for name in manifest.pooled if schema.columns[name].kind == "ids"]
        self.lists = {
            name
            for name in self.user
            if isinstance(self.example.get(name), list)
            or (self.example.get(name) is None and name in schema.file_columns(of_ids))
        }

    def described(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of each input, as the protocol's metadata has them."""
        names = dict.fromkeys([self.item, *self.user, *self.history])
        return [{"name": name, "datatype": self._type_of(name), "shape": [-1]} for name in names]

    def _type_of(self, name: str) -> str:
        value = self.example.get(name)
        value = next(iter(value), None) if isinstance(value, list) else value
        if value is not None:
            return {bool: "BOOL", int: "INT64", float: "FP32"}.get(type(value), "BYTES")
        column = self.schema.columns.get(name)
        table = name if column is None else self.schema.table_of(name)
        if (known := self.schema.id_types.get(table)) is not None:
            return "BYTES" if known.name == "string" else "INT64"
        return "FP32" if column is None or column.kind == "dense" else "INT64"

    def request_of(self, tensors: Iterable[Tensor]) -> RankedUser:
        """Return tensors by column as a request.

        The item's tensor has the candidates, [N]; histories are [L]. A column of single values is
        [1] for the user or [N] for the candidates; one of lists [K], or [N, K] for the candidates.

        Raises:
            Refusal: a column is not of the package, is given twice, or has another shape.
        """
        named: dict[str, Tensor] = {}
        for tensor in tensors:
            if named.setdefault(tensor.name, tensor) is not tensor:
                raise Refusal(f"input '{tensor.name}': is given twice")
        if self.item not in named:
            raise Refusal(f"inputs: lack '{self.item}', the candidates")
        items = named.pop(self.item).values
        history = {name: named.pop(name).values for name in self.history if name in named}
        user, candidates = dict[str, Any](), {self.item: items}
        for name, tensor in named.items():
            self._require(name, self.user, "inputs")
            shape, values = tensor.shape, tensor.values
            if name in self.lists:
                rows, width = shape if len(shape) == 2 else (1, *shape)
                values = [values[row * width : (row + 1) * width] for row in range(rows)]
            if len(values) == 1:
                user[name] = values[0]
            elif len(values) == len(items):
                candidates[name] = values
            else:
                raise Refusal(f"input '{name}': shape {list(shape)} for {len(items)} candidates")
        return RankedUser(user, history, candidates)

    def check(self, request: RankedUser, limits: Limits) -> None:
        """Require known columns and allowed sizes.

        Raises:
            Refusal: names the column, its size and the limit.
        """
        item, history, candidates = self.item, request.history, request.candidates
        if not isinstance(candidates, Mapping):
            candidates = {item: candidates}
        events = history if isinstance(history, Mapping) else {"items": history}
        for name, value in request.user.items():
            self._require(name, self.user, "user")
            _check_size(f"user: '{name}'", [value], 1, limits)
        for name, values in events.items():
            if isinstance(history, Mapping):
                self._require(name, self.history, "history")
            _check_size(f"history: '{name}'", values or [], limits.max_history, limits)
        for name, values in candidates.items():
            self._require(name, [item, *self.user], "candidates")
            _check_size(f"candidates: '{name}'", values, limits.max_candidates, limits)

    @staticmethod
    def _require(name: str, known: Sequence[str], place: str) -> None:
        if name not in known:
            raise Refusal(f"{place}: '{name[:99]}' is none of the columns {list(known)}")


def _check_size(place: str, values: Sequence[Any], limit: int, limits: Limits) -> None:
    """Require at most `limit` values, and lists and strings in them within the limits."""
    if len(values) > limit:
        raise Refusal(f"{place} has {len(values)} values; the limit is {limit}")
    if not {str, list} & set(map(type, values)):  # a loop takes as long as parsing the request
        return
    for value in values:
        if isinstance(value, str) and len(value) > limits.max_text:
            raise Refusal(
                f"{place} has a text of {len(value)} characters; the limit is {limits.max_text}"
            )
        if isinstance(value, list):
            _check_size(place, value, limits.max_values, limits)
