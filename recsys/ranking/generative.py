"""Generative retrieval: a decoder writes the codes of the next item, from coarse to fine.

As in TIGER (arXiv 2305.05065): the codes are `recsys semantic-ids` of trained content, a last code
tells items apart that share them, and a beam search over the trie of items that exist finds the
best. The decoder reads the state of the user tower, once for all beams, and the codes so far.
Shapes: B batch, I items, L levels, T = L + 1 codes of an item with the last one, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.ranking.layers.code_decoder import CodeDecoder
from recsys.ranking.layers.code_trie import table_of
from recsys.ranking.settings import GenerativeSettings
from recsys.ranking.two_tower import QueryTower
from recsys.ranking.vectors import CodeLogits, IDVectors, InputDimensions


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
        super().__init__(settings, dimensions, content, settings.sequence_dim)
        if dimensions.num_labels != 1 or not dimensions.num_items:
            raise ValueError(
                "generative writes the codes of the next item, from one label and items that do "
                f"not change in training; schema.yaml has {dimensions.num_labels} labels and "
                f"{dimensions.num_items or 'a bounded vocabulary of'} items"
            )
        levels, codes = settings.code_levels, settings.num_codes
        self.num_codes = codes
        self.decoder = CodeDecoder(
            settings.sequence_dim, settings.sequence_heads, settings.decoder_layers, levels, codes
        )
        rows = np.arange(dimensions.num_items)
        digits = rows[:, None] // codes ** np.arange(levels) % codes  # until `set_codes`
        self.register_buffer("table", torch.zeros(len(rows), levels + 2, dtype=torch.int64))
        self.set_codes(rows, digits)

    def set_codes(self, rows: np.ndarray, codes: np.ndarray) -> None:  # int64 [I], int64 [I, L]
        """Set the codes of the items in these rows of the item table; others get none.

        Raises:
            ValueError: the codes are not those of the settings, or too many items share theirs.
        """
        levels = self.decoder.num_levels - 1
        if codes.shape[1] != levels or codes.max(initial=0) >= self.num_codes:
            raise ValueError(
                f"ranking.code_levels is {levels} and ranking.num_codes {self.num_codes}, but the "
                f"items have {codes.shape[1]} codes up to {codes.max(initial=0)}; set those of "
                "recsys semantic-ids"
            )
        table = table_of(codes)
        if (most := table[:, -1].max(initial=0)) > self.num_codes:
            raise ValueError(
                f"{most:,} items share all {levels} codes, and the last one tells "
                f"{self.num_codes} apart; raise ranking.num_codes or ranking.code_levels, and "
                "write semantic ids of as many codes with --balanced true"
            )
        self.table.fill_(-1)
        self.table[torch.from_numpy(rows)] = torch.from_numpy(table)

    def forward(self, ids: IDVectors, content: ContentVectors | None, batch: Batch) -> CodeLogits:
        states = self.user(ids, content, batch).float()  # [B, D]
        items = batch.target.items.clamp(min=0, max=self.table.shape[0] - 1)
        table = self.table[items]  # [B, T + 1]
        has_codes = (table[:, -1] > 0) & (items == batch.target.items)
        log_probs = self.decoder(states, table.clamp(min=0))
        return CodeLogits(states.unsqueeze(1), log_probs, has_codes)
