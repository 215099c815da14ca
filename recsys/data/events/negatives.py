"""Draws items that a user never took, as samples with labels 0.

A draw depends on the seed, its positive and its number alone, whatever the engine and the order.

Shapes: P positives of a chunk, N items of the catalogue, T pairs of a user and an item taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import mix64
from recsys.data.events.as_of import key_numbers, whole_keys
from recsys.data.events.engines.base import Engine
from recsys.data.events.settings import EventsConfig, Negatives
from recsys.data.events.signals import quoted

ATTEMPTS = 64  # attempts per draw, as a user may have taken nearly everything


@dataclass(frozen=True)
class DrawNegatives:
    """Maps sorted chunks with each user's positives and items taken to the drawn samples.

    settings: number and distribution.
    ends: int64 [N], cumulative weights of the items.
    labels, columns: of a sample; labels of drawn ones are 0.
    schema: of the drawn samples.
    """

    settings: Negatives
    ends: np.ndarray
    labels: list[str]
    columns: list[str]
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the drawn samples of each chunk."""
        for chunk in whole_keys(batches, ["uid"]):
            yield from self._draw(chunk).cast(self.schema).to_batches()

    def _draw(self, chunk: pa.Table) -> pa.Table:
        user, item = key_numbers(chunk, ["uid"]), chunk["inumber"].to_numpy()
        is_positive = chunk["is_positive"].to_numpy() == 1
        taken = np.unique(user[~is_positive] * len(self.ends) + item[~is_positive])  # [T]
        rows = np.repeat(np.flatnonzero(is_positive), self.settings.per_positive)
        nth = np.arange(len(rows)) % self.settings.per_positive
        position = chunk["position"].to_numpy()[rows]
        start = mix64(mix64(position) + mix64(nth + (self.settings.seed << 20)))
        drawn = np.full(len(rows), -1)
        for attempt in range(ATTEMPTS):
            open_ = np.flatnonzero(drawn < 0)
            if not len(open_):
                break
            noise = mix64(start[open_] + np.uint64(attempt)) >> np.uint64(1)
            weight = noise.astype(np.int64) % self.ends[-1]
            chosen = np.searchsorted(self.ends, weight, side="right")
            free = ~np.isin(user[rows[open_]] * len(self.ends) + chosen, taken)
            drawn[open_[free]] = chosen[free]
            pairs = rows * len(self.ends) + drawn
            repeated = np.ones(len(rows), bool)  # of an item within the draws of a positive
            repeated[np.unique(pairs, return_index=True)[1]] = False
            drawn[repeated] = -1
        keep = drawn >= 0
        kept = chunk.select(self.columns).take(pa.array(rows[keep]))
        columns = {name: kept[name] for name in self.columns}
        # Distinct from all others, and below all positions that files have.
        columns["position"] = pa.array(-1 - (position * self.settings.per_positive + nth)[keep])
        columns |= {name: pa.array(np.zeros(int(keep.sum()))) for name in self.labels}
        return pa.table({**columns, "inumber": pa.array(drawn[keep])})


def add_negatives(engine: Engine, config: EventsConfig) -> dict[str, int]:
    """Make the stage `drawn` of `rows` and samples drawn for those whose first label is 1.

    Returns:
        How many draws were given up, under their reason.
    """
    settings = config.negatives
    assert settings is not None
    catalogue = "SELECT iid, count(*) AS n FROM signals GROUP BY iid"
    if config.items is not None:
        catalogue = (
            f"SELECT iid, sum(n) AS n FROM ({catalogue} UNION ALL "
            "SELECT DISTINCT id AS iid, 0 AS n FROM item_snapshots) GROUP BY iid"
        )
    numbered = f"SELECT iid, n, row_number() OVER (ORDER BY iid) - 1 AS inumber FROM ({catalogue})"
    engine.add("catalogue", numbered)
    counts = engine.table("SELECT CAST(n AS BIGINT) AS n FROM catalogue ORDER BY inumber")
    weights = counts["n"].to_numpy()
    ends = np.cumsum(np.ones_like(weights) if settings.by == "uniform" else weights)
    first = quoted(f"l_{next(iter(config.labels))}")
    schema = engine.table("SELECT * FROM rows LIMIT 0").schema
    columns = [name for name in schema.names if name != "iid"]
    labels = [f"l_{name}" for name in config.labels]
    empty = ", ".join("NULL" if name != "uid" else "t.uid" for name in columns)
    names = ", ".join(map(quoted, columns))
    query = (
        f"SELECT {names}, 0 AS inumber, 1 AS is_positive FROM rows WHERE {first} = 1 UNION ALL "
        f"SELECT {empty}, c.inumber, 0 AS is_positive FROM "
        "(SELECT DISTINCT uid, iid FROM signals) t JOIN catalogue c ON t.iid = c.iid"
    )
    kinds = [schema.field(name) for name in columns]
    draw = DrawNegatives(
        settings, ends, labels, columns, pa.schema([*kinds, ("inumber", pa.int64())])
    )
    engine.add_mapped("draws", query, ["uid"], ["is_positive", "position"], draw, draw.schema)
    engine.add(
        "drawn",
        f"SELECT {names}, iid FROM rows UNION ALL SELECT "
        f"{', '.join(f'd.{quoted(name)}' for name in columns)}, c.iid "
        "FROM draws d JOIN catalogue c ON d.inumber = c.inumber",
    )
    counted = engine.table(
        f"SELECT (SELECT count(*) FROM rows WHERE {first} = 1) AS p, "
        "(SELECT count(*) FROM draws) AS d"
    )
    missing = counted["p"][0].as_py() * settings.per_positive - counted["d"][0].as_py()
    return {"no item left to draw": missing} if missing else {}
