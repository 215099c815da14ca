"""Rows of all ranks with a gradient: the way of GPUs beside that of hosts."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from recsys.distributed import gather
from recsys.distributed.gather import gather_rows_with_gradient
from tests.ranks import run_on_ranks

DIM = 2


def gathered_on_rank(rank: int, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Gather `rank + 1` rows, and return them all and the gradient of a loss of this rank."""
    local = (torch.arange((rank + 1) * DIM).float().view(-1, DIM) + 10 * rank).requires_grad_()
    way = gather._gather_and_scatter if on_gpu else gather.all_gather
    with patch.object(gather, "all_gather", way):
        rows, first = gather_rows_with_gradient(local)
    (rows * (rank + 1) * torch.arange(1, len(rows) + 1).unsqueeze(1)).sum().backward()
    return {"rows": rows.detach(), "first": first, "gradient": local.grad}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_each_rank_has_all_rows_and_its_part_of_the_summed_gradients(on_gpu: bool) -> None:
    ranks = run_on_ranks(gathered_on_rank, 3, on_gpu)
    expected = [
        torch.arange((rank + 1) * DIM).float().view(-1, DIM) + 10 * rank for rank in range(3)
    ]
    for rank, output in enumerate(ranks):
        first = sum(range(rank + 1))
        assert torch.equal(output["rows"], torch.cat(expected)) and output["first"] == first
        factors = torch.arange(first + 1, first + rank + 2) * 6.0  # 1 + 2 + 3, of all ranks
        assert torch.equal(output["gradient"], factors.unsqueeze(1).expand(-1, DIM))
