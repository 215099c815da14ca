"""Routes of memory bank rows between ranks, computed from ids alone before the vectors exist.

Shapes: U ids, W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class BankRoute:
    """The route of the rows of some ids, from the ranks that hold them to the requesting rank.

    order: int64 [U], the order that sorts the ids by the rank that holds them; `wanted_counts` of
        them are on each rank.
    rows: int64, rows of this rank's block that the ranks request, those for rank 0 first;
        `asked_counts` for each rank.

    Example::

        import torch
        from embeddings import BankRoute

        # On one rank: rows 7 and 9, requested and held by that rank.
        BankRoute(torch.tensor([0, 1]), [2], torch.tensor([7, 9]), [2])
    """

    order: Tensor
    wanted_counts: list[int]
    rows: Tensor
    asked_counts: list[int]


Routes = tuple[BankRoute | None, BankRoute | None]  # to read, to write


def exchange_routes(
    wanted: Sequence[Tensor], block_size: int, group: dist.ProcessGroup | None
) -> Callable[[], list[BankRoute]]:
    """Begin to compute a route for each of several lists of ids [U], on the host.

    Call the result to finish. Both are collectives. Rank r holds the rows from r * `block_size` on.
    """
    kinds, world_size = len(wanted), dist.get_world_size(group)
    first = dist.get_rank(group) * block_size
    ids = torch.cat(list(wanted))
    kind = torch.arange(kinds).repeat_interleave(torch.tensor([len(part) for part in wanted]))
    owner = ids // block_size
    key = owner * kinds + kind
    counts = key.bincount(minlength=world_size * kinds).view(-1, kinds)  # [W, kinds]
    asked = torch.empty_like(counts)
    work = dist.all_to_all_single(asked, counts, group=group, async_op=True)

    def finish() -> list[BankRoute]:
        """Send the ids to their owners, once the counts have arrived. A collective."""
        work.wait()
        received = ids.new_empty(int(asked.sum()))
        splits = asked.sum(1).tolist(), counts.sum(1).tolist()
        dist.all_to_all_single(received, ids[key.argsort(stable=True)], *splits, group=group)
        kind_of = torch.arange(kinds).repeat(world_size).repeat_interleave(asked.flatten())
        return [
            BankRoute(
                order=owner[kind == index].argsort(stable=True),
                wanted_counts=counts[:, index].tolist(),
                rows=received[kind_of == index] - first,
                asked_counts=asked[:, index].tolist(),
            )
            for index in range(kinds)
        ]

    return finish
