"""Unusable rows: the first one ends the job, or all are skipped and counted.

A defect of a whole file (no footer, a missing column, a wrong type) is always an error. A part is a
range of a file's rows that is read at once. Shapes: n rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recsys.distributed.log import print_table
from recsys.storage.location import Location

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks

OnBadRow = Literal["error", "skip"]
LINES = 20  # largest number of lines of the printed report; `metrics.json` has all entries

# Takes the mask of bad rows in a part of a file, their reason, and a function from row to message.
Report = Callable[[np.ndarray, str, Callable[[int], str]], None]
# File, column, first row of the part, reason.
BadRowKey = tuple[str, str, int, str]


class BadRows:
    """Raises at the first bad row, or counts all; a part that is read again counts once."""

    def __init__(self, on_bad_row: OnBadRow = "error") -> None:
        self.on_bad_row = on_bad_row
        self.counts: dict[BadRowKey, tuple[int, int]] = {}  # number of bad rows, and the first one

    def add(
        self,
        file: Location | str,
        column: str,
        first_row: int,
        bad: np.ndarray,  # [n], bool
        reason: str,
        message: Callable[[int], str],
    ) -> None:
        """Record the bad rows of a column, "" for whole rows, in the part from `first_row` on.

        If `on_bad_row` is error, raise a ValueError with file, column, row and message instead.
        """
        if not bad.any():
            return
        row = int(bad.argmax())
        if self.on_bad_row == "error":
            where = f"column '{column}', row {first_row + row}: " if column else ""
            raise ValueError(f"{file}: {where}{message(row)}")
        self.counts[str(file), column, first_row, reason] = (int(bad.sum()), first_row + row)

    def summary(self, ranks: Ranks, subject: str) -> dict[str, Any]:
        """Return `by_reason` of all ranks as `rows` and `found`; rank 0 prints it. A collective."""
        merged: dict[BadRowKey, tuple[int, int]] = {}
        for bad_rows in ranks.gather(self.counts):
            merged |= bad_rows
        total, entries = by_reason(merged)
        if entries and ranks.is_first:
            lines = [f"skipped {_rows(total)} of {subject}:"]
            lines += [f"  {_entry(entry)}" for entry in entries[:LINES]]
            if len(entries) > LINES:
                lines.append(f"  and {len(entries) - LINES:,} more")
            print_table("\n".join(lines))
        return {"rows": total, "found": entries}


def by_reason(bad_rows: dict[BadRowKey, tuple[int, int]]) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of bad rows, and an entry for each file, column and reason."""
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (file, column, _, reason), (rows, first) in sorted(bad_rows.items()):
        entry = {"file": file, "column": column, "reason": reason, "rows": 0, "first_row": first}
        entries.setdefault((file, column, reason), entry)["rows"] += rows
    return sum(rows for rows, _ in bad_rows.values()), list(entries.values())


def no_row_left(rows: int, subject: str, entries: list[dict[str, Any]]) -> ValueError:
    """Return the error to raise if every row of `subject` was skipped, with the first reasons."""
    return ValueError(
        f"none of the {_rows(rows)} of {subject} can be used; fix the data, or the schema: "
        + ", ".join(map(_entry, entries[:2]))
    )


def _entry(entry: dict[str, Any]) -> str:
    column = f" column '{entry['column']}'" if entry["column"] else ""
    rows = f"{_rows(entry['rows'])}, first: row {entry['first_row']}"
    return f"{entry['file']}{column}: {entry['reason']} ({rows})"


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"
