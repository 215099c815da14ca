"""A small two-tower run on items whose ids are words, and the folder of its item vectors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.config import ContentSettings
from recsys.data.prepare import prepare_vocabularies
from recsys.distributed.ranks import joined_ranks
from recsys.serving.retrieval.item_vectors import export_vectors
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.ranking.backbone_runs import backbone_config

NUM_ITEMS = 130  # more than the deepest list of the evaluation
NUM_ROWS = {"train": 61, "valid": 24, "test": 70}
ITEM = f"num_embeddings: {NUM_ITEMS}"


def write_named_items(folder: Path) -> Path:
    """Writes the small dataset with ids such as `item 7`; one test item has no row in `items`."""
    write_dataset(folder, NUM_ROWS, num_items=NUM_ITEMS)
    for path in folder.glob("*/*.parquet"):
        table = pq.read_table(path)
        for name in {"item", "history"} & set(table.column_names):
            ids = pa.array([_text_id(value) for value in table[name].to_pylist()])
            table = table.set_column(table.column_names.index(name), name, ids)
        if path.parent.name == "items":
            table = table.filter(pc.not_equal(table["item"], "item 3"))
        pq.write_table(table, path, row_group_size=7)
    schema = folder / "schema.yaml"
    exact = f"num_embeddings: {NUM_ITEMS + 1}, vocabulary: {{kind: exact}}"
    schema.write_text(schema.read_text().replace(ITEM, exact))
    prepare_vocabularies(str(folder))
    return folder


def _text_id(value: Any) -> Any:
    if isinstance(value, list):
        return [_text_id(item) for item in value]
    return None if value is None else f"item {value}"


def train_towers(folder: Path) -> Path:
    """Trains `folder/run` on `folder/data` and exports its vectors; returns `folder`."""
    if (folder / "vectors").exists():
        return folder
    write_named_items(folder / "data")
    config = backbone_config(folder, "two_tower in_batch", "concat", batch_size=9, epochs=1)
    # Narrow towers give some items one vector, and ties have no order that could be compared.
    ranking: Any = replace(config.ranking, mlp_units=[32], tower_dim=16)  # type: ignore[call-arg]
    assert isinstance(config.content, ContentSettings)
    # The bank then has what the best model encodes.
    history = replace(config.content.history, refresh_bank_every_epoch=True)
    content = replace(config.content, history=history)
    config = replace(config, ranking=ranking, content=content)
    with joined_ranks("cpu") as ranks:
        train(config, str(folder / "data"), folder / "run", ranks)
        export_vectors(folder / "run", folder / "vectors", None, "flat", ranks)
    return folder


def liked_rows(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """User, history and item of each test row with a positive label."""
    for row in pq.read_table(folder / "data" / "test").to_pylist():
        if row["liked"] > 0:
            history = {name: row[name] for name in ("history", "history_liked")}
            yield {"user": row["user"], "price": row["price"]}, history, row["item"]
