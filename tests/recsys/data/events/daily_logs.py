"""Small logs that grow by days, and the content of datasets that are made of them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HOUR = 3_600
DAY = 24 * HOUR
START = 1_789_948_800  # 2026-09-21 in UTC
DAYS = [f"2026-09-{day}" for day in range(21, 29)]
SMALL: dict[str, Any] = {
    "events": {"view": {"path": "log"}, "buy": {"path": "buys"}},
    "rows": "view",
    "labels": {"bought": {"action": "buy", "within": "12h"}},
    "histories": {"viewed": {"actions": "view"}},
}


def write_small(folder: Path, **changes: Any) -> Path:
    """Settings of a log without times of arrival, and its files of a day."""
    for name in ("log", "buys"):
        (folder / name).mkdir(exist_ok=True)
        add_file(folder / name / "0.parquet", [("ann", 1, 1 * HOUR), ("bob", 2, 20 * HOUR)])
    (folder / "events.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    return folder / "events.yaml"


def add_file(file: Path, rows: list[tuple[str, int, int]]) -> None:
    """Write rows of user, item, and seconds since the first day began."""
    columns = {name: [row[index] for row in rows] for index, name in enumerate(("user", "item"))}
    pq.write_table(pa.table({**columns, "time": [START + row[2] for row in rows]}), file)


def content_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a dataset by folder or file; maps of ids as sets, as their order may differ."""
    partitions = {file.parent for file in (out / "train").rglob("*.parquet")}
    folders = [*sorted(partitions), *sorted((out / "features").glob("*"))]
    rows = {
        str(folder.relative_to(out)): [
            row
            for file in sorted(folder.glob("*.parquet"))
            for row in pq.read_table(file, partitioning=None).to_pylist()
        ]
        for folder in [*folders, out / "items"]
    }
    rows["counts"] = pq.read_table(out / "item_counts.parquet").to_pylist()
    for file in sorted((out / "vocabulary").glob("*")):
        rows[file.name] = sorted(pq.read_table(file)["id"].to_pylist())
    return rows
