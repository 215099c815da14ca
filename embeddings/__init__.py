"""The large ID tables: configuration, sharding, optimizers and the memory bank.

Shapes: B batch, L history, N ids, D dimension, F features, U unique items, W ranks.
Public names are imported on first use, so that the maps of ids load without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embeddings.memory_bank import MemoryBank as MemoryBank
    from embeddings.memory_bank import build_memory_bank as build_memory_bank
    from embeddings.plan_text import format_plan as format_plan
    from embeddings.pretrained import PretrainedFiles as PretrainedFiles
    from embeddings.pretrained import load_pretrained_rows as load_pretrained_rows
    from embeddings.sharding import fuse_table_optimizers as fuse_table_optimizers
    from embeddings.sharding import plan_sharding as plan_sharding
    from embeddings.table_sharders import sharders as sharders
    from embeddings.tables import TableConfig as TableConfig
    from embeddings.tables import build_embedding_bag_collection as build_embedding_bag_collection
    from embeddings.tables import build_embedding_collection as build_embedding_collection
    from embeddings.vocabulary.bounded import BoundedVocabulary as BoundedVocabulary
    from embeddings.vocabulary.fixed import ExactVocabulary as ExactVocabulary
    from embeddings.vocabulary.fixed import HashVocabulary as HashVocabulary

_HOMES = {
    "MemoryBank": "embeddings.memory_bank",
    "build_memory_bank": "embeddings.memory_bank",
    "format_plan": "embeddings.plan_text",
    "PretrainedFiles": "embeddings.pretrained",
    "load_pretrained_rows": "embeddings.pretrained",
    "plan_sharding": "embeddings.sharding",
    "fuse_table_optimizers": "embeddings.sharding",
    "sharders": "embeddings.table_sharders",
    "TableConfig": "embeddings.tables",
    "build_embedding_bag_collection": "embeddings.tables",
    "build_embedding_collection": "embeddings.tables",
    "BoundedVocabulary": "embeddings.vocabulary.bounded",
    "ExactVocabulary": "embeddings.vocabulary.fixed",
    "HashVocabulary": "embeddings.vocabulary.fixed",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embeddings' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
