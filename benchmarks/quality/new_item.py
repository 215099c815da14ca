"""Rank items that came after training by their texts alone, for users who took them.

    python -m benchmarks quality new-item --data DATA --run RUN --out runs/new_item

Exports a run, and adds a copy of each item of test that training never saw, under a new id, as
`recsys package add-items` does: by content, with counts of 0. Then it ranks items for users of
test, each with the history of a row: for users who took an item, and for as many others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, write_result
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.scores import read_scores, scores_file
from recsys.serving.export import export_run
from recsys.serving.new_items.add import add_items
from recsys.serving.scorer import Scorer
from recsys.storage.location import Location

COPY = "copy of "  # before the id of an item that is added


def new_item(
    data: str,
    run: Path,
    out: Path,
    items: int = 8,
    users: int = 40,
    title: str = "title",
    results: Path = RESULTS,
) -> None:
    """Rank added items and write the page.

    Args:
        data: the dataset of the run, with string ids of items.
        run: the finished run.
        out: folder for the package, which must not exist.
        items: how many of the added items the page shows, those taken most.
        users: most users of each item that are ranked for, and as many who did not take it.
        title: column of `items/` that the page shows.
        results: folder for the figures.

    Raises:
        ValueError: the run has no unseen items in test, or no content.
    """
    schema = load_schema(Location.of(data))
    rows = pq.read_table(Path(data) / "test")
    catalogue = pq.read_table(Path(data) / "items")
    takers = _takers(run, rows, schema.target_item)
    names = dict(zip(catalogue[schema.target_item].to_pylist(), catalogue[title].to_pylist()))
    with joined_ranks("cpu") as ranks:
        export_run(run, out / "package", "fp32", ranks)
    add_items(out / "package", str(_write_copies(catalogue, schema, list(takers), out)))
    ranking = Ranking(Scorer.load(out / "package"), rows, list(names), list(takers))
    generator = np.random.default_rng(0)
    records = []
    for item in list(takers)[:items]:
        other_rows = np.setdiff1d(np.arange(rows.num_rows), takers[item])
        other_rows = generator.choice(other_rows, min(users, len(takers[item])), replace=False)
        ranked = [ranking.item_ranks(item, group) for group in (takers[item][:users], other_rows)]
        records.append(_record(item, names[item], ranking, len(takers[item]), *ranked))
    write_result(_result(records), results)


def _takers(run: Path, rows: pa.Table, item: str) -> dict[str, np.ndarray]:
    """Return the positive rows of test of each item without a training row, the most taken first.

    Raises:
        ValueError: there are none.
    """
    scores = read_scores(scores_file(run, "test"))
    positions = scores.positions[(scores.counts == 0) & (scores.labels[:, 0] > 0)]
    if not len(positions):
        raise ValueError(f"{run}: test has no positive row of an item without training rows")
    raw = np.asarray(rows[item].take(positions).to_pylist())
    unseen_items, counts = np.unique(raw, return_counts=True)
    return {
        str(name): positions[raw == name]
        for name in unseen_items[np.argsort(-counts, kind="stable")]
    }


def _write_copies(catalogue: pa.Table, schema: Schema, items: Sequence[str], out: Path) -> Path:
    """Write the rows of items under new ids."""
    name = schema.target_item
    copies = catalogue.filter(pc.is_in(catalogue[name], pa.array(items)))
    ids = pa.array([COPY + item for item in copies[name].to_pylist()])
    copies = copies.set_column(copies.column_names.index(name), name, ids)
    file = out / "new_items.parquet"
    pq.write_table(copies, file)
    return file


@dataclass(frozen=True)
class Ranking:
    """Ranks the items of a package, and copies of `new_items`, for the users of rows."""

    scorer: Scorer
    rows: pa.Table
    items: list[str]
    new_items: list[str]

    def item_ranks(self, item: str, rows: np.ndarray) -> np.ndarray:  # [N] -> int64 [N, 2]
        """Return the rank, from 1, of an item's copy among all items, and among the copies."""
        copies = [COPY + name for name in self.new_items]
        item_ranks = []
        for number in rows.tolist():
            row, schema = self.rows.slice(number, 1).to_pylist()[0], self.scorer.schema
            history = {name: row[name] for name in (*schema.event_columns, *schema.parallel)}
            user = {schema.group: row[schema.group]}
            scores = self.scorer.score(user, history, [*self.items, *copies])[:, 0]
            earlier, later = np.split(scores, [len(self.items)])
            item_score = later[self.new_items.index(item)]
            item_ranks.append([1 + int((block > item_score).sum()) for block in (earlier, later)])
        return np.array(item_ranks)


def _record(
    item: str,
    title: str,
    ranking: Ranking,
    num_takers: int,
    takers: np.ndarray,
    non_takers: np.ndarray,
) -> dict[str, Any]:
    return {
        "benchmark": "new_item",
        "item": item,
        "title": title,
        "taken": num_takers,
        "items": len(ranking.items),
        "new_items": len(ranking.new_items),
        "place_for_takers": np.median(takers, axis=0).tolist(),
        "place_for_others": np.median(non_takers, axis=0).tolist(),
    }


def _result(records: list[dict[str, Any]]) -> Result:
    columns = ["item", "taken in test", "place among all, for those who took it"]
    columns += ["for others", "place among the new, for those who took it", "for others"]
    rows = [
        [
            record["title"],
            f"{record['taken']}",
            *(
                f"{record[name][column]:,.0f}"
                for column in (0, 1)
                for name in ("place_for_takers", "place_for_others")
            ),
        ]
        for record in records
    ]
    items, new = records[0]["items"], records[0]["new_items"]
    reading = [
        f"Medians over users of the place of a copy of the item among all {items:,} items, and "
        f"among the copies of the {new:,} items that test takes and training never saw; by chance "
        f"{items / 2:,.0f} and {new / 2:,.0f}. A copy has its texts alone: no row of an ID, no "
        "event, counts of 0. The others have the counts at the end of the log, which include test. "
        "Negatives that are drawn by popularity are seldom items without an event, so that the "
        "model ranks those high for everyone: the places among the new tell what their texts say."
    ]
    title = "Where does an item of texts alone rank, for those who took it later?"
    return Result("new_item", title, records, columns, rows, None, reading)


if __name__ == "__main__":
    auto_cli(new_item, as_positional=False)
