"""ContentBranch: the content of a batch's items -> their content vectors, each item encoded once.

Encoders turn each modality into tokens, a linear map per modality brings them to one width, the
fusion makes one vector per unique item, and indices spread the vectors over targets and history.
History vectors come from the memory bank (or from the encoder, mode `full`) through the history
map. The branch holds no sharded module, so it is data-parallel under DistributedModelParallel.

Shapes: U unique items, T tokens, D content dimension, M modalities, B batch,
N history items of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embeddings import MemoryBank
from recsys.batch import Batch, ContentInput
from recsys.config import ContentSettings
from recsys.content.encoder import Encoder, mean_token
from recsys.content.fusion import build_fusion
from recsys.content.history import HistoryMap
from recsys.vectors import ContentVectors


class ContentBranch(nn.Module):
    """Encodes the unique items of a batch and looks its history up.

    Args:
        encoders: by modality name.
        settings: dimension, fusion and history.
        bank: what is kept by item, of width `settings.vector_dim`; None for history mode `full`.

    Example::

        bank = MemoryBank(num_items, settings.vector_dim, "cpu")
        branch = ContentBranch({"text": encoder}, settings, bank)
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
        self.dim = settings.dim
        self.keeps_modalities = settings.history.similarity_features
        self.history_map = HistoryMap(settings.dim, settings.history)
        self.encodes_history = settings.history.mode == "full"
        assert self.encodes_history == (bank is None)
        self.bank = bank
        self.step = 0  # of training, written beside the vectors in the bank

    def encode(self, content: dict[str, ContentInput]) -> Tensor:
        """Content of unique items -> what is kept per item, [U, D + M * D].

        First the content vector, then the mean token of each modality (M = 0 without
        similarities): cosines of single modalities tell more of unseen items than those of the
        fused vector, which must first be learned.
        """
        tokens, masks, modality, means = [], [], [], []
        for index, (name, encoder) in enumerate(self.encoders.items()):
            assert isinstance(encoder, Encoder)
            encoded = encoder.encode(content[name])
            projected = self.projections[name](encoded.values)
            tokens.append(projected)
            masks.append(encoded.mask)
            modality.append(torch.full((encoded.mask.shape[1],), index, device=encoded.mask.device))
            if self.keeps_modalities:
                means.append(mean_token(projected, encoded.mask))
        fused = self.fusion(torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.cat(modality))
        return torch.cat([fused, *means], dim=1)

    def forward(self, batch: Batch) -> ContentVectors:
        items = self.item_vectors(batch)  # [E + S or received, D + M * D]
        if self.bank is None:
            history = items[batch.history_content_index]
        else:
            history, _ = self.bank.lookup(batch.history_items)  # [U, D + M * D]
        target, target_modalities = self._split(items)
        history, history_modalities = self._split(history)
        return ContentVectors(
            target=target[batch.target_index],
            history=self.history_map(history),
            target_modalities=target_modalities[batch.target_index],
            history_modalities=history_modalities,
        )

    def item_vectors(self, batch: Batch) -> Tensor:
        """What is kept of the items to rank, and of the histories' where those are encoded."""
        fresh = self.encode(batch.content)  # [E, D + M * D]
        if self.bank is not None and self.training:
            # Written before the lookup: what any rank has just computed replaces what is
            # stale in the histories of all ranks, in this very step (LEMUR, 2511.10962).
            self.bank.update(batch.content_items, fresh, self.step)
            self.step += 1
        return fresh

    def _split(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """[U, D + M * D] -> content vectors [U, D] and mean tokens [U, M, D]."""
        num_modalities = kept.shape[1] // self.dim - 1
        return kept[:, : self.dim], kept[:, self.dim :].reshape(len(kept), num_modalities, self.dim)
