"""First values for rows of a table that no training step has updated.

`table_rows` reads and writes rows of a sharded table under any plan, `ridge` fits the linear map
from vectors that are known of an id, such as those of its content, to its row.
"""
