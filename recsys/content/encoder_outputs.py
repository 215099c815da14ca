"""Trained encoders run for a share of a step's items; the other items take their last outputs.

A trained encoder costs many times what the rest of a step costs, and its outputs change slowly.
Projections, fusion and all later layers train on every item of the step. LEMUR (arXiv 2511.10962)
instead reads stored fused vectors of the other items, which get no gradient and are older than the
projections.
Shapes: E items that this rank encodes, C chosen ones, W sum of the widths of trained encoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from embeddings import MemoryBank, build_memory_bank
from embeddings.memory_bank import BankRoute
from recsys.config import ContentSettings
from recsys.content.encoders.base import Encoder
from recsys.data.batch import BatchContent, EncodedItems
from recsys.data.items.kind import ContentInput


class EncoderOutputs:
    """The last output of each trained encoder for each item, `content.encoder_share`.

    encoders: by modality, each with one token per item. share: of a step's items for which encoders
    run. bank: a row of width W per item; `write` fills it before the first step.
    """

    def __init__(self, encoders: Mapping[str, Encoder], share: float, bank: MemoryBank) -> None:
        self.encoders, self.share, self.bank = dict(encoders), share, bank

    @staticmethod
    def from_settings(
        bank: MemoryBank | None, content: ContentSettings, encoders: Mapping[str, Encoder]
    ) -> EncoderOutputs | None:
        """Return empty outputs, placed as the memory bank; None if encoders run for all items.

        A trained encoder with several tokens per item is a ValueError.
        """
        if bank is None or content.encoder_share == 1:
            return None
        trained = {n: encoders[n] for n, m in content.modalities.items() if m.training != "frozen"}
        for name, encoder in trained.items():
            if content.modalities[name].module and encoder.frozen_tokens > 1:
                raise ValueError(
                    f"content.encoder_share is {content.encoder_share}, which keeps one "
                    f"vector per item, but content.modalities.{name}.module has "
                    f"{encoder.frozen_tokens} tokens; set it to 1, or average them in the module"
                )
        width, placement = sum(model.output_dim for model in trained.values()), content.history.bank
        rows = build_memory_bank(bank.num_items, width, bank.device, bank.group, placement)
        return EncoderOutputs(trained, content.encoder_share, rows)

    def encode(self, content: Mapping[str, ContentInput]) -> dict[str, ContentInput]:
        """Run all encoders, without dropout, whose noise the stored outputs would keep."""
        for encoder in self.encoders.values():
            encoder.eval()
        return {name: encoder.encode(content[name]) for name, encoder in self.encoders.items()}

    def write(
        self,
        items: Tensor,
        tokens: Mapping[str, ContentInput],
        step: int,
        route: BankRoute | None = None,
    ) -> None:
        """Store the tokens [C, 1, D] of items [C], or of none. A collective."""
        rows = torch.zeros(0, self.bank.dim, device=self.bank.device)
        if len(items):
            rows = torch.cat([tokens[name].values[:, 0].float() for name in self.encoders], dim=1)
        self.bank.update(items, rows, step, route)

    def choose(self, items: Tensor, step: int) -> Callable[[], EncodedItems]:
        """Choose and route items [E] on the host; call the result to end. Both are collectives."""
        indices = self._select(items, step)
        routes = self.bank.routes(items, items[indices])
        return lambda: EncodedItems(indices, *routes())

    def _select(self, items: Tensor, step: int) -> Tensor:  # [E] -> [C]
        return sample_indices(items, math.ceil(self.share * len(items)), step)

    def tokens(self, content: BatchContent, step: int) -> dict[str, ContentInput]:
        """Return the tokens [E, 1, D] of items: of chosen ones with gradient. A collective."""
        items, tokens = content.items, {}
        encoded = content.encoded or EncodedItems(self._select(items, step))
        indices = encoded.positions
        stored, _ = self.bank.lookup(items, encoded.reads)
        inputs = {name: content.inputs[name] for name in self.encoders}
        outputs = self.encode({name: entries[indices] for name, entries in inputs.items()})
        self.write(items[indices], outputs, step, encoded.writes)
        widths = [encoder.output_dim for encoder in self.encoders.values()]
        for (name, entries), old in zip(inputs.items(), stored.split(widths, dim=1)):
            values = outputs[name].values[:, 0]
            merged = old.to(values.dtype).index_copy(0, indices, values)
            tokens[name] = ContentInput(merged.unsqueeze(1), entries.mask.any(dim=1, keepdim=True))
        return tokens


def sample_indices(items: Tensor, count: int, step: int) -> Tensor:  # [E] -> [C]
    """Return the indices of `count` items, ascending, by a hash that a resumed run repeats."""
    hashed = (items + 7919 * step) % 2**20 * 2654435761 % 2**32
    return hashed.argsort(stable=True)[:count].sort().values
