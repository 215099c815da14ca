"""The large ID tables: configuration, sharding, optimizers and the memory bank.

This package knows TorchRec and nothing of models. Shapes in its docstrings: B batch, L history,
N ids, D dimension, F features, U unique items, W ranks. The order of use is that of every TorchRec
script: tables on meta, model, optimizer in backward, plan, DistributedModelParallel, dense
optimizer.
"""

from embeddings.memory_bank import (
    BankRoute,
    MemoryBank,
    ReplicatedMemoryBank,
    build_memory_bank,
    is_replicated,
)
from embeddings.plan_text import format_plan
from embeddings.pretrained_files import PretrainedFiles
from embeddings.pretrained_rows import load_pretrained_rows
from embeddings.row_reset import RowReset
from embeddings.sharding import machine_topology, plan_sharding
from embeddings.table_optimizers import fuse_table_optimizers
from embeddings.table_sharders import sharders
from embeddings.tables import (
    TableConfig,
    build_embedding_bag_collection,
    build_embedding_collection,
    check_tables,
)
from embeddings.vocabulary import BoundedVocabulary, ExactVocabulary, HashVocabulary

__all__ = [
    "BankRoute",
    "BoundedVocabulary",
    "ExactVocabulary",
    "HashVocabulary",
    "MemoryBank",
    "PretrainedFiles",
    "ReplicatedMemoryBank",
    "RowReset",
    "TableConfig",
    "build_embedding_bag_collection",
    "build_embedding_collection",
    "build_memory_bank",
    "check_tables",
    "format_plan",
    "fuse_table_optimizers",
    "is_replicated",
    "load_pretrained_rows",
    "machine_topology",
    "plan_sharding",
    "sharders",
]
