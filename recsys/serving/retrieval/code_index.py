"""Searches items by their codes: the decoder of a generative model, and the trie of the items.

Shapes: I items, L levels of codes, Q queries, K results, D width of a user's state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from recsys.ranking.generative import (
    MOST_BEAMS,
    CodeDecoder,
    CodeTrie,
    Generative,
    add_codes,
    beam_search,
)
from recsys.ranking.settings import GenerativeSettings

DECODER = "decoder.safetensors"


class CodeIndex:
    """Has the methods of a FAISS index that a retriever calls; scores are log-probabilities."""

    def __init__(self, decoder: CodeDecoder, table: np.ndarray, beam_size: int) -> None:
        self.decoder, self.beam_size = decoder.eval(), beam_size
        self.trie = CodeTrie(table)

    @staticmethod
    def load(folder: Path, table: np.ndarray, sizes: dict[str, int]) -> CodeIndex:
        """Load the decoder of a folder; the table of codes is int64 [I, L + 2]."""
        beam_size = sizes["beam_size"]
        decoder = CodeDecoder(**{name: size for name, size in sizes.items() if name != "beam_size"})
        decoder.load_state_dict(load_file(folder / DECODER))
        return CodeIndex(decoder, table, beam_size)

    @property
    def ntotal(self) -> int:
        return len(self.trie)

    def search(
        self, queries: np.ndarray, count: int, params: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:  # float32 [Q, D] -> float32 [Q, K], int64 [Q, K]
        """Return log-probabilities and places of the best items; -1: none found."""
        del params
        width = max(count, self.beam_size)
        results = [
            beam_search(self.decoder, self.trie, states, width)
            for states in torch.from_numpy(queries).split(max(1, MOST_BEAMS // width))
        ]
        scores, places = (torch.cat(parts)[:, :count].numpy() for parts in zip(*results))
        return scores, places

    def add(self, codes: np.ndarray) -> None:  # int64 [N, L]
        """Insert items behind the others; ValueError: more share all codes than are told apart."""
        table, most = add_codes(self.trie.table, codes), self.decoder.codes.shape[1]
        if table[:, -1].max(initial=0) > most:
            raise ValueError(
                f"more than {most} items share all their codes; train with more ranking.num_codes"
            )
        self.trie = CodeTrie(table)


def write_decoder(folder: Path, model: Generative, settings: GenerativeSettings) -> dict[str, int]:
    """Write the decoder; return its sizes and the width of a search, for a manifest."""
    state = {name: value.contiguous() for name, value in model.decoder.state_dict().items()}
    save_file(state, folder / DECODER)
    return {
        "dim": settings.sequence_dim,
        "heads": settings.sequence_heads,
        "layers": settings.decoder_layers,
        "levels": settings.code_levels,
        "codes": settings.num_codes,
        "beam_size": settings.beam_size,
    }
