"""The memory bank: one vector per item that is written as items are encoded, and read by id.

`sharded` cuts it over the ranks (`MemoryBank`), `replicated` keeps it whole on each
(`ReplicatedMemoryBank`); `routes` defines how rows travel between ranks (`BankRoute`).
`build_memory_bank` chooses between the two.
"""

from embeddings.memory_bank.replicated import (
    ReplicatedMemoryBank,
    build_memory_bank,
    is_replicated,
)
from embeddings.memory_bank.routes import BankRoute
from embeddings.memory_bank.sharded import MemoryBank

__all__ = [
    "BankRoute",
    "MemoryBank",
    "ReplicatedMemoryBank",
    "build_memory_bank",
    "is_replicated",
]
