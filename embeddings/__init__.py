"""The large ID tables: configuration, sharding, optimizers and the memory bank.

This package depends on TorchRec and on no model. Shapes in its docstrings: B batch, L history,
N ids, D dimension, F features, U unique items, W ranks. The order of use is that of every TorchRec
script: tables on meta, model, optimizer in backward, plan, DistributedModelParallel, dense
optimizer.

The public names are imported on first use, so that the maps of ids load without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embeddings.memory_bank import BankRoute as BankRoute
    from embeddings.memory_bank import MemoryBank as MemoryBank
    from embeddings.memory_bank import ReplicatedMemoryBank as ReplicatedMemoryBank
    from embeddings.memory_bank import build_memory_bank as build_memory_bank
    from embeddings.memory_bank import is_replicated as is_replicated
    from embeddings.plan_text import format_plan as format_plan
    from embeddings.pretrained_files import PretrainedFiles as PretrainedFiles
    from embeddings.pretrained_rows import load_pretrained_rows as load_pretrained_rows
    from embeddings.row_reset import RowReset as RowReset
    from embeddings.sharding import machine_topology as machine_topology
    from embeddings.sharding import plan_sharding as plan_sharding
    from embeddings.table_optimizers import fuse_table_optimizers as fuse_table_optimizers
    from embeddings.table_sharders import sharders as sharders
    from embeddings.tables import TableConfig as TableConfig
    from embeddings.tables import build_embedding_bag_collection as build_embedding_bag_collection
    from embeddings.tables import build_embedding_collection as build_embedding_collection
    from embeddings.tables import check_tables as check_tables
    from embeddings.vocabulary.bounded import BoundedVocabulary as BoundedVocabulary
    from embeddings.vocabulary.fixed import ExactVocabulary as ExactVocabulary
    from embeddings.vocabulary.fixed import HashVocabulary as HashVocabulary

_NAMES = {
    "memory_bank": "BankRoute MemoryBank ReplicatedMemoryBank build_memory_bank is_replicated",
    "plan_text": "format_plan",
    "pretrained_files": "PretrainedFiles",
    "pretrained_rows": "load_pretrained_rows",
    "row_reset": "RowReset",
    "sharding": "machine_topology plan_sharding",
    "table_optimizers": "fuse_table_optimizers",
    "table_sharders": "sharders",
    "tables": "TableConfig build_embedding_bag_collection build_embedding_collection check_tables",
    "vocabulary.bounded": "BoundedVocabulary",
    "vocabulary.fixed": "ExactVocabulary HashVocabulary",
}
_HOMES = {name: f"embeddings.{home}" for home, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'embeddings' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
