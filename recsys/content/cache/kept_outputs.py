"""Runs trained encoders for a share of a step's items; the others take their last outputs.

A trained encoder costs many times what the rest of a step costs, and its outputs change slowly.
So it runs, with gradient, for the items encoded longest ago, which are rare and new ones. The
others' outputs are kept from then, and all that lies above the encoder trains on every item; LEMUR
(arXiv 2511.10962) reads the fused vectors of the others instead, which get no gradient.

Shapes: E items of a rank's step, C chosen ones, W sum of the widths of the trained encoders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from embeddings import MemoryBank, build_memory_bank
from recsys.config import ContentSettings
from recsys.content.encoders.base import Encoder
from recsys.data.items.content_input import ContentInput


def sampled_encoders(
    content: ContentSettings, encoders: Mapping[str, Encoder]
) -> dict[str, Encoder]:
    """Return the trained encoders that run for a share of the items, by modality.

    Raises:
        ValueError: one of them gives an item several tokens.
    """
    if content.sampling.encoders == 1:
        return {}
    trained = {n: of for n, of in encoders.items() if content.modalities[n].training != "frozen"}
    for name in trained:
        if content.modalities[name].module and trained[name].frozen_tokens > 1:
            raise ValueError(
                f"content.sampling.encoders is {content.sampling.encoders}, which keeps one vector "
                f"per item, but content.modalities.{name}.module gives "
                f"{trained[name].frozen_tokens}; set it to 1, or average them in the module"
            )
    return trained


class EncoderOutputs:
    """The last output of each trained encoder for each item.

    Args:
        encoders: the encoders, each with one token per item.
        share: share of the items for which they run.
        bank: a row of width W per item, and the step in which it was written.
    """

    def __init__(self, encoders: Mapping[str, Encoder], share: float, bank: MemoryBank) -> None:
        """Keep the parts; the rows are written by `write` before the first step."""
        self.encoders, self.share, self.bank = dict(encoders), share, bank
        self.widths = [encoder.output_dim for encoder in encoders.values()]

    @staticmethod
    def beside(
        bank: MemoryBank | None, content: ContentSettings, encoders: Mapping[str, Encoder]
    ) -> EncoderOutputs | None:
        """Return the empty outputs of a job with that bank; None if encoders run for all items."""
        sampled = sampled_encoders(content, encoders)
        if bank is None or not sampled:
            return None
        width = sum(encoder.output_dim for encoder in sampled.values())
        outputs = build_memory_bank(
            bank.num_items, width, bank.device, bank.group, content.history.bank
        )
        return EncoderOutputs(sampled, content.sampling.encoders, outputs)

    def write(
        self,
        ids: Tensor,  # [C]
        tokens: Mapping[str, ContentInput],  # values [C, 1, D]
        step: int,
    ) -> None:
        """Keep the outputs of some items, or of none. A collective."""
        rows = torch.zeros(0, self.bank.dim, device=ids.device)
        if len(ids):
            outputs = [tokens[name].values[:, 0].detach().float() for name in self.encoders]
            rows = torch.cat(outputs, dim=1)
        self.bank.update(ids, rows, step)

    def tokens(
        self, ids: Tensor, content: Mapping[str, ContentInput], step: int
    ) -> dict[str, ContentInput]:
        """Return the tokens [E, 1, D] of items: new ones with gradient, the others as kept.

        A collective: new outputs are kept, and all ranks call it.

        Args:
            ids: of the items [E].
            content: of the same items.
            step: training step.
        """
        kept, written = self.bank.lookup(ids)
        chosen = oldest(ids, written, math.ceil(self.share * len(ids)), step)
        new: dict[str, ContentInput] = {}
        tokens: dict[str, ContentInput] = {}
        for (name, encoder), old in zip(
            self.encoders.items(), kept.split(self.widths, dim=1), strict=True
        ):
            values, mask = content[name].values, content[name].mask
            new[name] = encoder.encode(ContentInput(values[chosen], mask[chosen]))
            merged = old.index_copy(0, chosen, new[name].values[:, 0])
            tokens[name] = ContentInput(merged.unsqueeze(1), mask.any(dim=1, keepdim=True))
        self.write(ids[chosen], new, step)
        return tokens


def oldest(
    ids: Tensor,  # [E]
    written: Tensor,  # int64 [E]
    count: int,
    step: int,
) -> Tensor:  # [C]
    """Return the places of the `count` items written longest ago, ascending.

    Among equals a hash of id and step decides, so that a run that goes on chooses as one that did
    not stop.
    """
    draw = ((ids + 7919 * step) % 2**20 * 2654435761 >> 16) % 2**16
    order = (written.double() + draw / 2**16).argsort(stable=True)
    return order[:count].sort().values
