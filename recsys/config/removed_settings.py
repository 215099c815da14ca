"""Settings of earlier releases, which runs have in their `config.yaml`."""

from __future__ import annotations

import warnings
from typing import Any


def without_removed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of an earlier release as this one reads it.

    A FutureWarning names a setting that was in use, and what applies instead.
    """
    neighbours, embedding = recipe.get("neighbours"), recipe.get("embedding")
    if isinstance(neighbours, dict) and "decay" in neighbours:
        if neighbours["decay"] is not None:
            _warn("neighbours.decay", "has no effect: events of any age count the same; remove it")
        remaining = {key: value for key, value in neighbours.items() if key != "decay"}
        recipe = recipe | {"neighbours": remaining}
    tables = embedding.get("tables") if isinstance(embedding, dict) else None
    if not isinstance(embedding, dict) or not isinstance(tables, dict):
        return recipe
    former = [
        name
        for name, table in tables.items()
        if isinstance(table, dict) and table.get("new_rows") == "content"
    ]
    for name in former:
        _warn(f"embedding.tables.{name}.new_rows", "content is no value: mean applies; set mean")
    tables = tables | {name: tables[name] | {"new_rows": "mean"} for name in former}
    return recipe | {"embedding": embedding | {"tables": tables}}


def _warn(setting: str, text: str) -> None:
    warnings.warn(f"{setting}: {text}", FutureWarning, stacklevel=3)
