"""Rows as a log has them -> rows of one item each that the settings choose.

Shapes: N rows of a batch, M rows that it becomes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.events.files.columns import Field, Parts, column_values, is_text
from recsys.data.events.settings import EventTable, Several, Value
from recsys.data.filesystem import Location
from recsys.data.parquet.values import is_list, list_lengths

PLACE_BITS = 12  # of a row's position: place of the item among those of its row
MOST_ITEMS, MOST_ROWS = 1 << PLACE_BITS, 1 << 24  # of a row, and of a file


def columns_to_add(table: EventTable) -> list[str]:
    """Return the columns that no file has."""
    return [table.several.column] if table.several is not None and table.several.column else []


def narrowed(
    batch: pa.RecordBatch,
    table: EventTable,
    file: Location,
    first_row: int = 0,
    parts: Parts | None = None,
) -> tuple[pa.RecordBatch, np.ndarray]:  # batch [N] -> [M], int64 [M]
    """Split rows with several items and leave out those that `where` does not choose.

    `parts` are the values of the file's folders, which `where` may name, too.

    Returns:
        the rows, and the position in the file of each.

    Raises:
        ValueError: a column cannot be split, or is of another type than the value in `where`.
    """
    positions = np.arange(first_row, first_row + batch.num_rows)
    if table.several is not None:
        batch, positions = _split(batch, table.item, table.several, file, positions)
    for name, values in table.where.items():
        values = values if isinstance(values, list) else [values]
        chosen = _chosen(batch, name, values, parts or {}, file)
        batch = batch.filter(chosen)
        positions = positions[np.asarray(chosen)]
    return batch, positions


def _chosen(
    batch: pa.RecordBatch, name: str, values: list[Value], parts: Parts, file: Location
) -> pa.Array:  # [N], bool
    """Mark the rows whose column has one of some values.

    Raises:
        ValueError: one of these is no value of the column's type.
    """
    kind = None
    try:
        wanted = pa.array(values)
        column = column_values(batch, Field(name, name, "any"), parts, wanted.type)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        kind = column.type
        if pa.types.is_null(kind):  # a column without any value
            return pc.is_valid(column)
        cast = wanted.cast(kind)
        if pa.types.is_boolean(kind) and not cast.cast(wanted.type).equals(wanted):
            raise TypeError("a number other than 0 and 1")  # of which a cast makes true
        return pc.is_in(column, cast)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        type_of = "values of one type" if kind is None else f"type {kind}"
        raise ValueError(
            f"{file}: column '{name}' has {type_of}, but `where` the values {values}; write values "
            "of that type"
        ) from error


def _split(
    batch: pa.RecordBatch, item: str, several: Several, file: Location, rows: np.ndarray
) -> tuple[pa.RecordBatch, np.ndarray]:
    """Return a row for each item of each row, and the positions of these."""
    lists = batch.column(item)
    where = f"{file}: column '{item}'"
    if pa.types.is_null(lists.type):
        lists = lists.cast(pa.string())
    if is_text(lists.type):
        lists = _item_lists(lists, several.between)
    elif not is_list(lists.type):
        raise ValueError(f"{where} has type {lists.type}; `several` needs texts or lists")
    lengths = list_lengths(lists)
    counts = np.maximum(lengths, 1)  # a row without items stays one, without an item
    parents = np.repeat(np.arange(len(lists)), counts)
    begins = np.cumsum(counts) - counts
    places = np.arange(len(parents)) - begins[parents]
    if len(parents) and (places.max() >= MOST_ITEMS or rows.max() >= MOST_ROWS):
        raise ValueError(
            f"{where}: a row has at most {MOST_ITEMS} items, and a file at most {MOST_ROWS} rows; "
            "write more rows, or more files"
        )
    is_item = pa.array(lengths[parents] > 0)
    chosen = pc.if_else(is_item, pa.array(np.cumsum(np.asarray(is_item)) - 1), None)
    items = pc.list_flatten(lists).take(chosen)
    columns = dict(zip(batch.schema.names, batch.take(pa.array(parents)).columns, strict=True))
    if several.column is not None:
        items, columns[several.column] = _with_number(items, several, where, rows[parents])
    columns[item] = items
    return pa.record_batch(columns), (rows[parents] << PLACE_BITS) + places


def _item_lists(texts: pa.Array, between: str) -> pa.Array:  # [N] -> lists [N]
    """Split texts into items without white space around them; any of it is as good as a blank."""
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    if between == " ":
        return pc.utf8_split_whitespace(texts)
    lists = pc.split_pattern(texts, between)
    items = pc.utf8_trim_whitespace(lists.flatten())
    return pa.ListArray.from_arrays(lists.offsets, items, mask=lists.is_null())


def _with_number(
    items: pa.Array, several: Several, where: str, rows: np.ndarray
) -> tuple[pa.Array, pa.Array]:
    """Return items such as `N1-1` as the item and the number after it."""
    pattern = pc.split_pattern(items, several.separator, max_splits=1, reverse=True)
    has_both = pc.equal(pc.list_value_length(pattern), 2)
    has_item = pc.invert(pc.starts_with(items, several.separator))
    wrong = ~np.asarray(pc.and_(has_both, has_item).fill_null(True))
    if not wrong.any():
        try:
            return pc.list_element(pattern, 0), pc.list_element(pattern, 1).cast(pa.float64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where}: {error}; write a number after each item") from error
    place = int(wrong.argmax())
    raise ValueError(
        f"{where}, row {rows[place]}: '{items[place].as_py()}' is no item with a number after "
        f"'{several.separator}'; write both, or leave `column` out"
    )
