"""Make the dataset of the benchmark with Polars (`pip install polars`), for this log only.

python -m benchmarks.events.plain_polars LOG OUT
"""

import math
import sys
from pathlib import Path

import polars as pl

from benchmarks.events.log import HISTORY

DAY = 86_400


def samples(log: pl.LazyFrame) -> pl.DataFrame:
    """Return clicks with their histories and labels."""
    key = ["user", "item", "time"]
    click = log.filter(pl.col("action") == "click").select(key).unique().collect()
    click = click.sort("user", "time", "item").with_columns(
        earlier=(pl.col("time").rank("min").over("user") - 1).cast(pl.Int64)
    )
    # Clicks of one moment have the same number, so that the window is wider by them.
    tied = click.group_by("user", "time").len()["len"].max()
    histories = click.rolling(
        "earlier", period=f"{HISTORY + tied - 1}i", closed="left", group_by="user"
    ).agg(clicked=pl.col("item").tail(HISTORY), at=pl.col("time").tail(HISTORY))
    click = click.drop("earlier").hstack(histories.select("clicked", "at"))
    del histories
    buy = log.filter(pl.col("action") == "buy").select(key).sort("time")
    moments = click.lazy().select(*key, touched="time").sort("time")
    bought = (
        buy.join_asof(
            moments,
            on="time",
            by=["user", "item"],
            strategy="backward",
            allow_exact_matches=False,
        )
        .filter(pl.col("time") - pl.col("touched") <= DAY)
        .select("user", "item", time="touched", bought=pl.lit(1, pl.Float32))
        .unique()
    )
    return (
        click.lazy()
        .join(bought, on=key, how="left")
        .select(
            "user",
            "item",
            "clicked",
            clicked_age=(
                (pl.col("time") - pl.col("at")).list.eval(
                    ((pl.element() / DAY + 1).log10() / 2).cast(pl.Float32)
                )
            ),
            bought=pl.col("bought").fill_null(0),
            time=pl.col("time") * 1_000_000,
        )
        .sort("time", "user", "item")
        .collect()
    )


def prepare(folder: str, out: Path) -> None:
    """Write splits, counts of items and maps of ids."""
    log = pl.scan_parquet(f"{folder}/*.parquet")
    rows = samples(log)
    times = rows["time"]
    ends = [times[math.floor(share * (len(rows) - 1))] for share in (0.8, 0.9)]
    train = rows.filter(pl.col("time") <= ends[0])
    splits = {
        "train": train,
        "valid": rows.filter(pl.col("time") > ends[0], pl.col("time") <= ends[1]),
        "test": rows.filter(pl.col("time") > ends[1]),
    }
    for name, split in splits.items():
        (out / name).mkdir(parents=True)
        split.write_parquet(
            out / name / "part.parquet",
            compression="zstd",
            compression_level=1,
            row_group_size=8192,
        )
    counts = train.group_by("item").agg(train_rows=pl.len()).sort("item")
    counts.write_parquet(out / "item_counts.parquet")
    (out / "vocabulary").mkdir()
    training_events = log.filter(pl.col("time") * 1_000_000 <= ends[0])
    for name in ("user", "item"):
        ids = (
            training_events.select(id=pl.col(name))
            .unique()
            .sort("id")
            .with_row_index("row")
            .collect()
        )
        ids.select("id", pl.col("row").cast(pl.Int64)).write_parquet(
            out / "vocabulary" / f"{name}.parquet"
        )


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]))
