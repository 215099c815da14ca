"""The model of a partition beside items that were added since.

A continual run keeps its own maps of raw ids, which have the items of its last partition. Items
that are new have content, and rows of tables that no training has changed.
"""

from __future__ import annotations

from pathlib import Path

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.checkpoint.run_schema import PARTITION
from recsys.data.prepare_vocabulary import new_ids
from recsys.data.schema import Schema
from recsys.storage.files import read_json
from recsys.storage.location import Location


def add_new_items(run: Path, schema: Schema, root: Location) -> str:
    """Give new items of a dataset rows, if the run is that of a partition.

    Returns:
        Folder of the dataset with the run's training rows.

    Raises:
        ValueError: the run's files are damaged, or a table has too few rows for its items.
    """
    if not (run / PARTITION).is_file():
        return "train"
    found = schema.vocabularies.items()
    maps = {table: of for table, of in found if isinstance(of, ExactVocabulary)}
    for table, ids in new_ids(root, schema, None, maps).items():
        maps[table].extend([ids])
    return f"train/{read_json(run / PARTITION)['name']}"
