"""Small datasets of many schemas over the same rows, in partitions, and configurations for them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recsys.config import (
    Config,
    ContentSettings,
    ContrastiveSettings,
    EmbeddingSettings,
    FusionSettings,
    HistorySettings,
    ModalitySettings,
    ranking_settings,
)
from recsys.config.ranking import keys_of
from recsys.data.prepare import prepare_vocabularies
from tests.recsys.ranking.backbone_runs import BACKBONES, SMALL
from tests.several_histories import write_several_histories

PARTITIONS = ("date=2026-11-08", "date=2026-11-09")
USER, ITEM = {"kind": "id", "num_embeddings": 10}, {"kind": "id", "num_embeddings": 30}
HISTORY = {"kind": "sequence", "shares": "item"}
GENRES, PRICE, LIKED = {"kind": "ids", "num_embeddings": 5}, {"kind": "dense"}, {"kind": "label"}
SHOP = {"kind": "ids", "num_embeddings": 7, "vocabulary": {"kind": "hash", "num_hashes": 2}}
SEARCHED = {"kind": "sequence", "num_embeddings": 9, "vocabulary": {"kind": "bounded"}}
NO_LIST = {
    "user": USER,
    "item": ITEM,
    "history": HISTORY,
    "genres": GENRES,
    "price": PRICE,
    "liked": LIKED,
}


@dataclass(frozen=True)
class SchemaCase:
    """Columns of a schema, whether items have content, and further histories with content."""

    columns: dict[str, Any]
    has_content: bool = True
    content_histories: list[str] = field(default_factory=list)


SCHEMAS = {
    "no parallel list": SchemaCase(NO_LIST),
    "user, item and history": SchemaCase(
        {"user": USER, "item": ITEM, "history": HISTORY, "liked": LIKED}
    ),
    "three labels, no number": SchemaCase(
        {
            "user": USER,
            "item": ITEM,
            "history": HISTORY,
            "genres": GENRES,
            "liked": LIKED,
            "shared": {"kind": "label", "nullable": True},
            "rating": {"kind": "label", "loss": "mse"},
        }
    ),
    "several histories without lists": SchemaCase(
        {**NO_LIST, "bought": HISTORY, "searched": SEARCHED}, content_histories=["bought"]
    ),
    "several histories with lists": SchemaCase(
        {
            "user": USER,
            "item": ITEM,
            "history": {**HISTORY, "parallel": ["history_shop"]},
            "history_shop": SHOP,
            "bought": {**HISTORY, "parallel": ["bought_price", "bought_shop"]},
            "bought_shop": {"kind": "ids", "shares": "history_shop"},
            "liked": LIKED,
        },
        has_content=False,
    ),
    "no history": SchemaCase({"user": USER, "item": ITEM, "price": PRICE, "liked": LIKED}),
    "items alone": SchemaCase({"item": ITEM, "liked": LIKED}),
    "vocabularies": SchemaCase(
        {
            "user": {**USER, "vocabulary": {"kind": "bounded"}},
            "item": {"kind": "id", "num_embeddings": 40, "vocabulary": {"kind": "exact"}},
            "history": HISTORY,
            "genres": {**SHOP, "vocabulary": {"kind": "hash"}},
            "liked": LIKED,
        }
    ),
}


def write_case(folder: Path, case: SchemaCase) -> Path:
    """Write the rows of all cases with the schema of one; returns `folder`."""
    write_several_histories(folder)
    for number, path in enumerate(sorted(folder.glob("[tv]*/*.parquet"))):
        table, random = pq.read_table(path), np.random.default_rng(number)
        shared = random.integers(2, size=table.num_rows).astype(np.float32)
        is_unknown = random.random(table.num_rows) < 0.2
        table = table.append_column("shared", pa.array(shared, mask=is_unknown))
        rating = random.normal(size=table.num_rows).astype(np.float32)
        pq.write_table(table.append_column("rating", pa.array(rating)), path)
    for number, partition in enumerate(PARTITIONS):
        location = folder / "train" / partition
        location.mkdir()
        (folder / "train" / f"part-{number}.parquet").rename(location / "part-0.parquet")
        (location / "_SUCCESS").touch()
    schema = {
        "target_item": "item",
        "group": "user" if "user" in case.columns else "item",
        "columns": case.columns,
    }
    if case.has_content:
        schema["items"] = {"id": "item", "columns": {"clip": {"kind": "feature"}}}
    # Aliases are refused in schema.yaml.
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    (folder / "schema.yaml").write_text(yaml.dump(schema, Dumper=dumper, sort_keys=False))
    if case.columns["item"].get("vocabulary"):
        prepare_vocabularies(str(folder))
    return folder


def case_config(folder: Path, case: SchemaCase, backbone: str) -> Config:
    """A small configuration of a ranking backbone for a case."""
    keys = set(keys_of(backbone)) - {"query_features"}
    small = {key: value for key, value in SMALL.items() if key in keys}
    ranking = ranking_settings(backbone, dropout=0.0, **(small | BACKBONES[backbone]))
    config = Config(
        content="none",
        contrastive=ContrastiveSettings(weight=0.0),
        embedding=EmbeddingSettings(dim=8, init_std=0.1),
        ranking=ranking,
        batch_size=16,
        epochs=1,
        cache=str(folder / "cache"),
        device="cpu",
    )
    if not case.has_content:
        return config
    content = ContentSettings(
        modalities={"clip": ModalitySettings("feature", "clip")},
        dim=8,
        fusion=FusionSettings(name="concat"),
        history=HistorySettings(lora_rank=2, columns=case.content_histories),
    )
    return replace(config, content=content, contrastive=ContrastiveSettings(weight=0.1, dim=8))


def request_of(case: SchemaCase, row: dict[str, Any]) -> dict[str, Any]:
    """A row as a request for its item."""
    sequences = {
        name: column for name, column in case.columns.items() if column["kind"] == "sequence"
    }
    lists = [name for column in sequences.values() for name in column.get("parallel", [])]
    history = [*sequences, *lists]
    features = {
        name for name, column in case.columns.items() if column["kind"] in ("id", "ids", "dense")
    }
    user = sorted(features - {"item", *history})
    return {
        "user": {name: row[name] for name in user},
        "history": {name: row[name] for name in history},
        "candidates": [row["item"]],
    }
