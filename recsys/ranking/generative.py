"""Generative retrieval: a decoder predicts the codes of the next item, from coarse to fine.

As in TIGER (arXiv 2305.05065), the codes come from `recsys semantic-ids`, and a last code
distinguishes items that share all others. A beam search over a trie of existing items finds the
best. The decoder reads the state of the user tower, once for all beams, and the codes so far.
A row of the table of codes has an item's L codes, its last code, and the number of items that share
the L codes. The softmax over last codes has only that many, so that the last code of an item with
unique codes has probability 1.
Shapes: B batch, I items, L levels, T = L + 1 codes of an item with the last one, C codes, D width,
H heads, Q queries, K results of each, N nodes or beams.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.layers.causal_layers import TransformerLayer
from recsys.ranking.settings import EncoderSettings, GenerativeSettings
from recsys.ranking.two_tower import QueryTower
from recsys.ranking.vectors import CodeLogits, IDVectors, InputDimensions

MAX_BEAMS = 4096  # in one search, over all its queries
KeysAndValues = tuple[Tensor, Tensor]  # [N, H, tokens, D / H] each
TokenCache = list[KeysAndValues]  # of earlier tokens, by layer


class DecoderLayer(TransformerLayer):
    """A causal layer over the few tokens of each row, with or without cached earlier tokens."""

    def forward(
        self, states: Tensor, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:  # [N, tokens, D]; one token if there is a past
        kvq = self.kvq(self.norm(states)).unflatten(2, (3, self.heads, -1))
        keys, values, queries = kvq.permute(2, 0, 3, 1, 4)
        if past is not None:
            keys = torch.cat([past[0], keys], dim=2)
            values = torch.cat([past[1], values], dim=2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        return self._fed_forward(states, attended.transpose(1, 2).flatten(2)), (keys, values)


class CodeDecoder(nn.Module):
    """The user's state and the codes so far -> log-probabilities of the next code."""

    def __init__(self, dim: int, heads: int, layers: int, levels: int, codes: int) -> None:
        super().__init__()
        settings = EncoderSettings(sequence_dim=dim, sequence_heads=heads)
        self.num_levels = levels + 1
        self.codes = nn.Parameter(torch.randn(levels + 1, codes, dim) * dim**-0.5)
        self.places = nn.Parameter(torch.zeros(levels + 1, dim))
        self.layers = nn.ModuleList(DecoderLayer(settings, False) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor, table: Tensor) -> Tensor:  # [B, D], int64 [B, T + 1] -> [B]
        """Return the log-probability of an item's codes, in one pass: the reference of `step`."""
        codes, sizes = table[:, :-1], table[:, -1]
        embedded = [self.codes[level][codes[:, level]] for level in range(self.num_levels - 1)]
        tokens = torch.stack([states, *embedded], dim=1) + self.places
        for layer in self.layers:
            tokens, _ = layer(tokens)
        levels = range(self.num_levels)
        log_probs = [self._log_probs(tokens[:, level], level, sizes) for level in levels]
        item_log_probs = torch.stack(log_probs, dim=1).gather(2, codes.unsqueeze(2))  # [B, T, 1]
        return item_log_probs.sum(dim=(1, 2))

    def start(self, states: Tensor) -> Tensor:  # [N, D] -> [N, 1, D]
        return (states + self.places[0]).unsqueeze(1)

    def step(
        self, tokens: Tensor, past: TokenCache | None, level: int, sizes: Tensor | None = None
    ) -> tuple[Tensor, TokenCache]:  # [N, 1, D] -> [N, C]
        """Return the log-probabilities of the next code, and keys and values for later steps.

        At the last level `sizes` [N] are the numbers of items that share the codes so far.
        """
        cache = []
        for index, layer in enumerate(self.layers):
            tokens, keys_and_values = layer(tokens, None if past is None else past[index])
            cache.append(keys_and_values)
        return self._log_probs(tokens[:, 0], level, sizes), cache

    def follow(
        self, cache: TokenCache, parents: Tensor, level: int, codes: Tensor
    ) -> tuple[Tensor, TokenCache]:  # int64 [N], int64 [N] -> [N, 1, D]
        """Return the tokens of new codes, and the keys and values of their parents' beams."""
        tokens = self.codes[level][codes] + self.places[level + 1]
        return tokens.unsqueeze(1), [(keys[parents], values[parents]) for keys, values in cache]

    def _log_probs(self, tokens: Tensor, level: int, sizes: Tensor | None) -> Tensor:  # [N, D]
        logits = (self.norm(tokens) @ self.codes[level].T).float()
        if level == self.num_levels - 1:
            assert sizes is not None
            last_codes = torch.arange(logits.shape[1], device=logits.device)
            is_code = last_codes < sizes.clamp(min=1)[:, None]
            logits = logits.masked_fill(~is_code, -torch.inf)
        return logits.log_softmax(dim=1)


def add_codes(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Append items with codes [N, L] to a table [I, L + 2], whose items keep their last codes."""
    all_codes = np.concatenate([table[:, :-2], codes])
    group = np.unique(all_codes, axis=0, return_inverse=True)[1].reshape(-1)
    old_groups, new_groups = group[: len(table)], group[len(table) :]
    sizes = np.zeros(group.max(initial=-1) + 1, np.int64)
    sizes[old_groups] = table[:, -1]
    order = np.argsort(new_groups, kind="stable")
    positions = np.arange(len(new_groups)) - np.searchsorted(new_groups[order], new_groups[order])
    last = np.empty(len(new_groups), np.int64)
    last[order] = sizes[new_groups[order]] + positions
    np.add.at(sizes, new_groups, 1)
    last = np.concatenate([table[:, -2], last])
    return np.column_stack([all_codes, last, sizes[group]])


def code_table(codes: np.ndarray) -> np.ndarray:  # int64 [I, L] -> int64 [I, L + 2]
    """Return the table of items with these codes; items with equal codes are numbered in order."""
    return add_codes(np.zeros((0, codes.shape[1] + 2), np.int64), codes)


class Generative(QueryTower):
    """ID vectors, content vectors and dense features -> `CodeLogits`."""

    Settings = GenerativeSettings
    table: Tensor  # int64 [rows of the item table, T + 1]; -1: no codes

    def __init__(
        self,
        settings: GenerativeSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        levels, codes, dim = settings.code_levels, settings.num_codes, settings.sequence_dim
        super().__init__(settings, dimensions, content, dim)
        if dimensions.num_labels != 1 or not dimensions.num_items:
            raise ValueError(
                "generative writes the codes of the next item, from one label and items that do "
                f"not change in training; schema.yaml has {dimensions.num_labels} labels and "
                f"{dimensions.num_items or 'a bounded vocabulary of'} items"
            )
        self.num_codes = codes
        layers, heads = settings.decoder_layers, settings.sequence_heads
        self.decoder = CodeDecoder(dim, heads, layers, levels, codes)
        self.register_buffer("table", torch.full((dimensions.num_items, levels + 2), -1))
        if settings.semantic_ids is None:  # else digits might not suffice for all rows
            rows = np.arange(dimensions.num_items)
            self.set_codes(rows, rows[:, None] // codes ** np.arange(levels) % codes)

    def set_codes(self, rows: np.ndarray, codes: np.ndarray) -> None:  # int64 [I], int64 [I, L]
        """Set the codes of the items in these rows of the item table; other items have none.

        Raise a ValueError if codes do not fit the settings, or too many items share them all.
        """
        levels = self.decoder.num_levels - 1
        if codes.shape[1] != levels or codes.max(initial=0) >= self.num_codes:
            raise ValueError(
                f"ranking.code_levels is {levels} and ranking.num_codes {self.num_codes}, but the "
                f"items have {codes.shape[1]} codes up to {codes.max(initial=0)}; set those of "
                "recsys semantic-ids"
            )
        table = code_table(codes)
        if (largest := table[:, -1].max(initial=0)) > self.num_codes:
            raise ValueError(
                f"{largest:,} items share all {levels} codes, and the last one tells "
                f"{self.num_codes} apart; raise ranking.num_codes or ranking.code_levels, and "
                "write semantic ids of as many codes with --balanced true"
            )
        self.table.fill_(-1)
        device = self.table.device
        self.table[torch.from_numpy(rows).to(device)] = torch.from_numpy(table).to(device)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> CodeLogits:
        states = self.user(ids, content, batch, self.means(batch)).float()  # [B, D]
        items = batch.target.items.clamp(min=0, max=self.table.shape[0] - 1)
        table = self.table[items]  # [B, T + 1]
        has_codes = (table[:, -1] > 0) & (items == batch.target.items)
        log_probs = self.decoder(states, table.clamp(min=0))
        return CodeLogits(states.unsqueeze(1), log_probs, has_codes)


class CodeTrie:
    """Trie of the codes of items; nodes of a level are in ascending order of their codes.

    The rows of `table` [I, L + 2] are distinct. `first[level][node]` is the first child of a node;
    its other children follow. `codes[level]` are the codes of the children.
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
            child_leaves = np.flatnonzero(is_new)
            ends = np.append(np.searchsorted(child_leaves, starts), len(child_leaves))
            self.first.append(torch.from_numpy(ends))
            self.codes.append(torch.from_numpy(column[child_leaves]))
            starts = child_leaves
        leaves = np.flatnonzero(np.append(True, (paths[1:, :-1] != paths[:-1, :-1]).any(axis=1)))
        self.sizes = torch.from_numpy(table[order[leaves[: len(paths)]], -1])  # of the last parents

    def __len__(self) -> int:
        return len(self.items)

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [M], [M]
        """Return the children of all nodes, and for each the index of its parent in `nodes`."""
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
    """Return the log-probabilities and indices of the `width` best items; -1: none found.

    Each level keeps the `width` best prefixes. With a `width` of I the search is exact.
    """
    rows = torch.arange(len(states) if len(trie) else 0)
    nodes, scores = torch.zeros_like(rows), states.new_zeros(len(rows))
    tokens = decoder.start(states[: len(rows)])
    past: TokenCache | None = None
    for level in range(decoder.num_levels):
        is_last = level == decoder.num_levels - 1
        log_probs, cache = decoder.step(tokens, past, level, trie.sizes[nodes] if is_last else None)
        nodes, parents = trie.children(level, nodes)
        codes = trie.codes[level][nodes]
        scores, rows = scores[parents] + log_probs[parents, codes], rows[parents]
        beams = torch.arange(len(nodes))
        if is_seen is not None and is_last:
            beams = beams[~is_seen[rows, trie.items[nodes]]]
        best, ranks = _best(scores[beams], rows[beams], width)
        beams = beams[best]
        nodes, scores, rows = nodes[beams], scores[beams], rows[beams]
        if not is_last:
            tokens, past = decoder.follow(cache, parents[beams], level, codes[beams])
    items = torch.full((len(states), width), -1)
    highest = torch.full((len(states), width), -torch.inf)
    if len(rows):
        items[rows, ranks], highest[rows, ranks] = trie.items[nodes], scores.float()
    return highest, items


def _best(scores: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Return the `width` best beams of each row, best first, and the rank of each in its row."""
    order = scores.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    ascending = rows[order]
    ranks = torch.arange(len(order)) - torch.searchsorted(ascending, ascending)
    return order[ranks < width], ranks[ranks < width]
