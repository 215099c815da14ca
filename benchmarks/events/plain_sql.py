"""Make the dataset of the benchmark with plain SQL on DuckDB, for this log only, without checks.

python -m benchmarks.events.plain_sql LOG OUT MEMORY
"""

import math
import sys
from pathlib import Path

import duckdb

from benchmarks.events.log import HISTORY

DISTINCT = """
CREATE VIEW log AS SELECT "user", item, time, action FROM read_parquet('{log}/*.parquet');
CREATE TABLE click AS SELECT DISTINCT "user", item, time FROM log WHERE action = 'click';
"""
# A frame of rows may hold clicks of the same moment: it is wider by them, and they are cut off.
SAMPLE = """
CREATE TABLE sample AS
WITH bought AS (
    SELECT DISTINCT c."user", c.item, c.time
    FROM (SELECT * FROM log WHERE action = 'buy') b ASOF JOIN click c
    ON b."user" = c."user" AND b.item = c.item AND b.time > c.time
    WHERE b.time - c.time <= 86400
), past AS (
    SELECT *, list(item) OVER before AS items, list(time) OVER before AS times,
        row_number() OVER ordered - rank() OVER (PARTITION BY "user" ORDER BY time) AS tied
    FROM click
    WINDOW ordered AS (PARTITION BY "user" ORDER BY time, item),
        before AS (PARTITION BY "user" ORDER BY time, item
            ROWS BETWEEN {rows} PRECEDING AND 1 PRECEDING)
), cut AS (
    SELECT "user", item, time,
        items[greatest(len(items) - tied - {history} + 1, 1):len(items) - tied] AS clicked,
        times[greatest(len(times) - tied - {history} + 1, 1):len(times) - tied] AS moments
    FROM past
)
SELECT c."user", c.item, coalesce(clicked, []) AS clicked,
    [CAST(log10(1 + (c.time - past) / 86400) / 2 AS FLOAT) FOR past IN coalesce(moments, [])]
        AS clicked_age,
    CAST(b.time IS NOT NULL AS FLOAT) AS bought, c.time
FROM cut c LEFT JOIN bought b ON c."user" = b."user" AND c.item = b.item AND c.time = b.time;
"""
SPLIT = """
COPY (
    SELECT * REPLACE (time * 1000000 AS time) FROM sample WHERE {condition}
    ORDER BY sample.time, "user", item
) TO '{file}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192)
"""
IDS = """
COPY (
    SELECT id, row_number() OVER (ORDER BY id) - 1 AS row
    FROM (SELECT DISTINCT {column} AS id FROM log WHERE time <= {last}) ORDER BY id
) TO '{file}' (FORMAT parquet)
"""


def prepare(log: str, out: Path, memory: str) -> None:
    """Write splits, counts of items and maps of ids."""
    out.mkdir()
    temp = str(out / "spilled")
    db = duckdb.connect(config={"memory_limit": memory, "temp_directory": temp})
    db.execute("SET enable_progress_bar = false")
    db.execute(DISTINCT.format(log=log))
    tied, rows = db.sql(
        'SELECT max(n), sum(n) FROM (SELECT count(*) AS n FROM click GROUP BY "user", time)'
    ).fetchall()[0]
    db.execute(SAMPLE.format(history=HISTORY, rows=HISTORY + tied - 1))
    # The moment at a place of the order: quantile_disc takes the value at ceil(share rows) - 1.
    shares = [(math.floor(share * (int(rows) - 1)) + 0.5) / int(rows) for share in (0.8, 0.9)]
    train, valid = db.sql(f"SELECT quantile_disc(time, {shares}) FROM click").fetchall()[0][0]
    conditions = {
        "train": f"time <= {train}",
        "valid": f"time > {train} AND time <= {valid}",
        "test": f"time > {valid}",
    }
    for name, condition in conditions.items():
        (out / name).mkdir()
        db.execute(SPLIT.format(condition=condition, file=out / name / "part.parquet"))
    db.execute(
        f"COPY (SELECT item, count(*) AS train_rows FROM click WHERE time <= {train} "
        f"GROUP BY item ORDER BY item) TO '{out / 'item_counts.parquet'}' (FORMAT parquet)"
    )
    (out / "vocabulary").mkdir()
    for name in ("user", "item"):
        file = out / "vocabulary" / f"{name}.parquet"
        db.execute(IDS.format(column=f'"{name}"', last=train, file=file))


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
