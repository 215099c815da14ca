"""ContentBranch: the content of a batch's items -> their content vectors, each item encoded once.

Encoders turn each modality into tokens, a linear map per modality brings them to one width, the
fusion makes one vector per unique item, and indices spread the vectors over targets and history.
History vectors come from the memory bank (or from the encoder, mode `full`) through the history
map. The branch holds no sharded module, so it is data-parallel under DistributedModelParallel.

Shapes: U unique items, T tokens, D content dimension, B batch, N history items of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embeddings import MemoryBank
from recsys.batch import Batch, ContentInput
from recsys.config import ContentSettings
from recsys.content.encoders import Encoder
from recsys.content.fusion import build_fusion
from recsys.content.history import HistoryMap
from recsys.vectors import ContentVectors


class ContentBranch(nn.Module):
    """Encodes the unique items of a batch and looks its history up.

    Args:
        encoders: by modality name.
        settings: dimension, fusion and history.
        bank: content vectors by item; None for history mode `full`.

    Example::

        branch = ContentBranch({"text": encoder}, settings, MemoryBank(num_items, settings.dim))
        vectors = branch(batch)
    """

    def __init__(
        self, encoders: dict[str, Encoder], settings: ContentSettings, bank: MemoryBank | None
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(encoder.output_dim, settings.dim)
                for name, encoder in encoders.items()
            }
        )
        self.fusion = build_fusion(settings.fusion, settings.dim, len(encoders))
        self.history_map = HistoryMap(settings.dim, settings.history)
        self.encodes_history = settings.history.mode == "full"
        assert self.encodes_history == (bank is None)
        self.bank = bank
        self.step = 0  # of training, written beside the vectors in the bank

    def encode(self, content: dict[str, ContentInput]) -> Tensor:
        """Content of unique items -> content vectors [U, D]."""
        tokens, masks, modality = [], [], []
        for index, (name, encoder) in enumerate(self.encoders.items()):
            assert isinstance(encoder, Encoder)
            encoded = encoder.encode(content[name])
            tokens.append(self.projections[name](encoded.values))
            masks.append(encoded.mask)
            modality.append(torch.full((encoded.mask.shape[1],), index, device=encoded.mask.device))
        return self.fusion(torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.cat(modality))

    def forward(self, batch: Batch) -> ContentVectors:
        fresh = self.encode(batch.content)  # [U, D]
        if self.bank is None:
            history = fresh
        else:
            if self.training:
                # Written before the lookup: what any rank has just computed replaces what is
                # stale in the histories of all ranks, in this very step (LEMUR, 2511.10962).
                self.bank.update(batch.content_items, fresh, self.step)
                self.step += 1
            history, _ = self.bank.lookup(batch.history_items)  # [U', D]
        return ContentVectors(
            target=fresh[batch.target_index],
            history=self.history_map(history)[batch.history_index],
        )
