"""A synthetic log, and the `events.yaml` of the dataset that is made of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 5_000_000
HISTORY = 50
CONFIG = f"""\
events:
  log: {{path: log, action: action}}
rows: click
labels:
  bought: {{action: buy, within: 1d}}
unripe: keep  # the programs beside it cut by quantiles alone
embargo: false
histories:
  clicked: {{actions: click, length: {HISTORY}, parallel: {{clicked_age: age}}}}
"""
DAYS, START = 60, 1_790_000_000
BUYS = 0.1  # share of the events
EXPONENT, SHIFT = 1.2, 100  # of users: the one of rank r has a share as (r + SHIFT) ** -EXPONENT


def write_log(folder: Path, rows: int, users: int, items: int, days: int = DAYS) -> None:
    """Write clicks and purchases; activity follows Zipf's law, shifted for users (Mandelbrot)."""
    folder.mkdir(parents=True)
    shares = np.cumsum((np.arange(1.0, users + 1) + SHIFT) ** -EXPONENT)
    numbers = np.random.default_rng(0).permutation(users)  # ranks do not show in ids
    for first in range(0, rows, ROWS_PER_FILE):
        random = np.random.default_rng([1, first])
        number = min(ROWS_PER_FILE, rows - first)
        ranks = np.searchsorted(shares, random.random(number) * shares[-1])
        is_buy = random.random(number) < BUYS
        table = {
            "user": numbers[ranks],
            "item": random.zipf(EXPONENT, number) % items,
            "time": START + random.integers(0, days * 86_400, number),
            "action": pa.array(["click", "buy"]).take(pa.array(is_buy.astype(np.int8))),
        }
        pq.write_table(pa.table(table), folder / f"part-{first:012}.parquet")
