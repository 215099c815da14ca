"""Gather the rows of all ranks, with or without gradient. Shapes: N rows, D dimension."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


def gather_rows(
    tensor: Tensor, process_group: dist.ProcessGroup | None = None, to_all: bool = True
) -> Tensor:
    """Return the rows [N] or [N, D] of all ranks, detached, those of rank 0 first. A collective.

    Another dtype or D on some rank is a ValueError on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return tensor
    rows = tensor.detach()
    specs: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(specs, (tuple(rows.shape), str(rows.dtype)), group=process_group)
    if any((shape[1:], dtype) != (specs[0][0][1:], specs[0][1]) for shape, dtype in specs):
        raise ValueError(f"rows of the ranks cannot be joined, their shape and dtype are {specs}")
    # NCCL moves CUDA tensors only.
    is_nccl = dist.get_backend(process_group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else rows.device
    longest = max(shape[0] for shape, _ in specs)
    padded = torch.zeros((longest, *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    receives = to_all or dist.get_rank(process_group) == 0
    gathered = [torch.empty_like(padded) for _ in specs] if receives else []
    if to_all:
        dist.all_gather(gathered, padded, group=process_group)
    else:
        dist.gather(padded, gathered or None, group=process_group, group_dst=0)
    if not receives:
        return tensor[:0]
    rows_of_ranks = [rows[: shape[0]] for rows, (shape, _) in zip(gathered, specs, strict=True)]
    return torch.cat(rows_of_ranks).to(tensor.device)


def gather_rows_to_first(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rows of all ranks on rank 0, and none on the others. A collective."""
    return gather_rows(tensor, process_group, to_all=False)


def gather_rows_with_gradient(rows: Tensor) -> tuple[Tensor, int]:  # [N, D] -> [sum of N, D]
    """Return the rows of all ranks and the index of this rank's first row. A collective."""
    # On CPU if the group has a backend for it: to read counts on a GPU would make the host wait.
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config() else rows.device
    all_counts = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(all_counts, torch.full((1,), len(rows), device=device))
    counts = all_counts.tolist()
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    gathered = _gather_and_scatter(padded) if rows.is_cuda else all_gather(padded)
    blocks = [rank_rows[:count] for rank_rows, count in zip(gathered, counts, strict=True)]
    return torch.cat(blocks), sum(counts[: dist.get_rank()])


def _gather_and_scatter(rows: Tensor) -> tuple[Tensor, ...]:  # [N, D] -> [N, D] of each rank
    """Return the rows of all ranks; their gradient comes back by `reduce_scatter`. A collective.

    `all_gather` of torch.distributed.nn sends whole gradients to all if a group has two backends.
    """
    group = dist.group.WORLD
    assert group is not None
    return functional.all_gather_single_autograd(rows.contiguous(), 0, group).chunk(group.size())
