"""Bad files of impressions: what is done to a good dataset, and what the error must say."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.recsys.data.bad_impressions import FILE, BadInput, Spoil, table


def content(change: Callable[[bytes], bytes]) -> Spoil:
    """The file's bytes are changed."""
    return lambda data: (data / FILE).write_bytes(change((data / FILE).read_bytes()))


def _first_page(data: Path, group: int) -> int:
    with pq.ParquetFile(data / FILE) as parquet:
        return int(parquet.metadata.row_group(group).column(0).dictionary_page_offset)


def damaged_page(data: Path) -> None:
    """The header of a page in the last row group."""
    start = _first_page(data, 2)
    content(lambda old: old[:start] + b"\xff" * 40 + old[start + 40 :])(data)


def flipped_bit_under_a_checksum(data: Path) -> None:
    """A user id becomes another one that could be true; the writer stored checksums."""
    users = pq.read_table(data / FILE)
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none"}
    pq.write_table(users, data / FILE, write_page_checksum=True, **options)
    with pq.ParquetFile(data / FILE) as parquet:
        chunk = parquet.metadata.row_group(0).column(0)
        last_user = chunk.data_page_offset + chunk.total_compressed_size - 8

    def flip(old: bytes) -> bytes:
        return old[:last_user] + bytes([old[last_user] ^ 1]) + old[last_user + 1 :]

    content(flip)(data)


def in_extra_file(make: Spoil) -> Spoil:
    """Something else with the name of a data file."""
    return lambda data: make(data / "train" / "part-2.parquet")


def one_row(data: Path) -> None:
    """All of training."""
    (data / "train" / "part-0.parquet").unlink()
    table(lambda rows: rows.slice(0, 1))(data)


UNREADABLE = [f"{FILE}: ", "readable Parquet"]

FILES = {
    "zero bytes": BadInput(content(lambda _: b""), UNREADABLE),
    "page header overwritten": BadInput(damaged_page, [f"{FILE}: row group 2 (rows from 22)"]),
    "flipped bit under a checksum": BadInput(
        flipped_bit_under_a_checksum, [f"{FILE}: row group 0 (rows from 0)", "CRC"]
    ),
    "no rows": BadInput(table(lambda rows: rows.slice(0, 0)), [f"{FILE}: ", "no rows"]),
    "a folder named like a file": BadInput(in_extra_file(Path.mkdir), ["train/part-2.parquet: "]),
    "fewer rows than ranks": BadInput(one_row, ["1 training rows", "2 ranks"]),
    "no training files": BadInput(
        lambda data: shutil.rmtree(data / "train"),
        ["train: no *.parquet"],
    ),
}
