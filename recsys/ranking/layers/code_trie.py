"""The trie of the items' codes, and the search of it by a decoder.

An item has L codes of `recsys semantic-ids`, and a last one that numbers the items that share them.
A row of the table of codes has these and, behind them, how many items share the L codes: the last
code is one of so many, so that a new item that shares its codes with none has no unlikely code.
Shapes: I items, L levels, Q queries, K results of each, N nodes or beams, C codes, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recsys.ranking.layers.code_decoder import CodeDecoder

MOST_BEAMS = 4096  # of the queries that are searched together


def add_codes(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Append items with codes [N, L] to a table of codes [I, L + 2], whose last codes stay."""
    every = np.concatenate([table[:, :-2], codes])
    group = np.unique(every, axis=0, return_inverse=True)[1].reshape(-1)
    old_groups, new_groups = group[: len(table)], group[len(table) :]
    sizes = np.zeros(group.max(initial=-1) + 1, np.int64)
    sizes[old_groups] = table[:, -1]
    order = np.argsort(new_groups, kind="stable")
    places = np.arange(len(new_groups)) - np.searchsorted(new_groups[order], new_groups[order])
    last = np.empty(len(new_groups), np.int64)
    last[order] = sizes[new_groups[order]] + places
    np.add.at(sizes, new_groups, 1)
    last = np.concatenate([table[:, -2], last])
    return np.column_stack([every, last, sizes[group]])


def table_of(codes: np.ndarray) -> np.ndarray:  # int64 [I, L] -> int64 [I, L + 2]
    """Return the table of items with these codes, numbered in their order where these are equal."""
    return add_codes(np.zeros((0, codes.shape[1] + 2), np.int64), codes)


class CodeTrie:
    """Beginnings of the codes of items; nodes of a level are in ascending order of their codes.

    `table` [I, L + 2] has different rows. `first[level][node]` is the first child of a node, whose
    others follow; `codes[level]` are the codes of the nodes below.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table, paths = table, table[:, :-1]
        order = np.lexsort(paths.T[::-1])
        paths = paths[order]
        self.items = torch.from_numpy(order)  # of each leaf
        self.first: list[Tensor] = []
        self.codes: list[Tensor] = []
        starts = np.arange(min(len(paths), 1))  # the first leaf of each node of a level
        is_new = np.arange(len(paths)) == 0
        for column in paths.T:
            is_new = is_new | np.append(True, column[1:] != column[:-1])[: len(paths)]
            below = np.flatnonzero(is_new)
            ends = np.append(np.searchsorted(below, starts), len(below))
            self.first.append(torch.from_numpy(ends))
            self.codes.append(torch.from_numpy(column[below]))
            starts = below
        shares = np.flatnonzero(np.append(True, (paths[1:, :-1] != paths[:-1, :-1]).any(axis=1)))
        self.sizes = torch.from_numpy(table[order[shares[: len(paths)]], -1])  # of the last parents

    def __len__(self) -> int:
        return len(self.items)

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [M], [M]
        """Return the children of all nodes, and for each the place of its parent in `nodes`."""
        first, end = self.first[level][nodes], self.first[level][nodes + 1]
        parents = torch.repeat_interleave(torch.arange(len(nodes)), end - first)
        offsets = (end - first).cumsum(0) - (end - first)
        return first[parents] + torch.arange(len(parents)) - offsets[parents], parents


@torch.no_grad()
def beam_search(
    decoder: CodeDecoder,
    trie: CodeTrie,
    states: Tensor,  # [Q, D]
    width: int,
    is_seen: Tensor | None = None,  # bool [Q, I], items that are no results
) -> tuple[Tensor, Tensor]:  # float32 [Q, K], int64 [Q, K]
    """Return the log-probabilities and places of the `width` best items; -1: none found.

    Each level goes on with the `width` best beginnings. With as many as items, it misses none.
    """
    rows = torch.arange(len(states) if len(trie) else 0)
    nodes, scores = torch.zeros_like(rows), states.new_zeros(len(rows))
    beam = decoder.start(states[: len(rows)])
    for level in range(decoder.num_levels):
        sizes = trie.sizes[nodes] if level == decoder.num_levels - 1 else None
        log_probs, cache = decoder.step(beam, level, sizes)
        nodes, parents = trie.children(level, nodes)
        codes = trie.codes[level][nodes]
        scores, rows = scores[parents] + log_probs[parents, codes], rows[parents]
        if is_seen is not None and level == decoder.num_levels - 1:
            is_left = ~is_seen[rows, trie.items[nodes]]
            nodes, parents, scores, rows = (
                part[is_left] for part in (nodes, parents, scores, rows)
            )
        best, places = _best(scores, rows, width)
        nodes, parents, scores, rows = (part[best] for part in (nodes, parents, scores, rows))
        if level < decoder.num_levels - 1:
            beam = decoder.follow(cache, parents, level, trie.codes[level][nodes])
    items = torch.full((len(states), width), -1)
    highest = torch.full((len(states), width), -torch.inf)
    if len(rows):
        items[rows, places], highest[rows, places] = trie.items[nodes], scores.float()
    return highest, items


def _best(scores: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Return which of the beams are among the best of their row, best first, and at what place."""
    order = scores.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    ascending = rows[order]
    places = torch.arange(len(order)) - torch.searchsorted(ascending, ascending)
    return order[places < width], places[places < width]
