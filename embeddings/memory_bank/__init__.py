"""The memory bank: one vector per item, written when the item is encoded and read by id.

`sharded` splits it over the ranks (`MemoryBank`), `replicated` keeps all of it on each rank
(`ReplicatedMemoryBank`); `routes` defines how rows are sent between ranks (`BankRoute`).
`build_memory_bank` chooses between the two.
"""

from embeddings.memory_bank.replicated import ReplicatedMemoryBank, build_memory_bank, is_replicated
from embeddings.memory_bank.routes import BankRoute
from embeddings.memory_bank.sharded import MemoryBank

__all__ = ["BankRoute", "MemoryBank", "ReplicatedMemoryBank", "build_memory_bank", "is_replicated"]
