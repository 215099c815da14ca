"""How long the lists of the training rows are, for the sharding planner's estimate of the load."""

from __future__ import annotations

from recsys.data.filesystem import Location
from recsys.data.parquet_file import open_parquet
from recsys.data.schema import Schema


def mean_list_lengths(root: Location, schema: Schema) -> dict[str, float]:
    """Mean ids per row of each list column, as the footer of the first training file counts them.

    Empty where there is no such file, or none that can be read: then there is nothing to estimate,
    and what is wrong is told where its rows are read.
    """
    lists = [name for name, column in schema.columns.items() if column.kind in ("ids", "sequence")]
    try:
        file = (root / "train").files(".parquet")[0]
        with open_parquet(file) as parquet:
            metadata = parquet.metadata
            leaves = {
                metadata.schema.column(index).path.split(".")[0]: index
                for index in range(metadata.num_columns)
            }
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            return {
                name: sum(group.column(leaves[name]).num_values for group in groups)
                / metadata.num_rows
                for name in lists
                if name in leaves and metadata.num_rows
            }
    except (IndexError, ValueError):
        return {}
