"""The large ID tables: configuration, sharding, optimizers and the memory bank.

Shapes: B batch, L history, N ids, D dimension, F features, U unique items, W ranks.
Public names are imported on first use, so that the vocabularies load without torch.
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

_MODULES = {
    "memory_bank": ("MemoryBank", "build_memory_bank"),
    "plan_text": ("format_plan",),
    "pretrained": ("PretrainedFiles", "load_pretrained_rows"),
    "sharding": ("plan_sharding", "fuse_table_optimizers"),
    "table_sharders": ("sharders",),
    "tables": ("TableConfig", "build_embedding_bag_collection", "build_embedding_collection"),
    "vocabulary.bounded": ("BoundedVocabulary",),
    "vocabulary.fixed": ("ExactVocabulary", "HashVocabulary"),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"embeddings.{module}"), name)
    raise AttributeError(f"module 'embeddings' has no attribute '{name}'")
