"""The user's content interest: target attention and similarities over the history's content.

Similarity features follow SimTier (arXiv 2407.19467), split by whether the user liked the item.
Shapes: B batch, U unique history items, N history items of the batch, D dimension, M modalities,
P parallel lists, G groups of history items, R flags of the latest items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ContentSettings, HistorySettings
from recsys.content.vectors import ContentVectors
from recsys.data.jagged_history import JaggedHistory
from recsys.kernels import has_native, native_content_interest, result_dtype
from recsys.ranking.layers.target_attention import DotAttention, at_least_float32

LOWER_THAN_COSINE = -2.0


def cosines(target: Tensor, items: Tensor, history: JaggedHistory) -> Tensor:  # [N]
    """Return the cosine of each history item to its row's target; 0 if either vector is zero."""
    dtype = torch.promote_types(target.dtype, items.dtype)
    items = at_least_float32(items.to(dtype))
    lengths = torch.linalg.vector_norm(items, dim=1, keepdim=True).clamp(min=1e-12)
    if history.is_shared:
        return history.dot(F.normalize(target.to(items.dtype), dim=-1), items / lengths)
    # Dividing the dot products by the items' norms costs less than normalising the items.
    products = history.dot(F.normalize(target.to(items.dtype), dim=-1), items)
    return products * history.gather(lengths.reciprocal()).squeeze(1)


def similarity_features(
    cosine: Tensor,  # [N, M], one column per space
    history: JaggedHistory,
    flags: Tensor,  # [N, P], such as liked (1) or not (0)
) -> Tensor:  # [B, M * S], S = 2 * G + P with G = 1 + 2 * P groups of history items
    """Summarise the cosines of the target to groups of history items: G means, G maxima, P votes.

    The groups are all items, those with each flag, and those without it. A list's vote is its mean
    weighted by softmax(cosine / 0.1). Without items features are 0.
    """
    spaces, batch = cosine.shape[1], history.lengths.shape[0]
    flagged = flags > 0.5
    all_items = torch.ones(flags.shape[0], 1, dtype=torch.bool, device=flags.device)
    groups = torch.cat([all_items, flagged, ~flagged], dim=1)  # [N, G]
    count = history.sum(groups.to(cosine.dtype)).unsqueeze(1)  # [B, 1, G]
    members = cosine.unsqueeze(2) * groups.unsqueeze(1)  # [N, M, G]
    mean = history.sum(members.flatten(1)).view(batch, spaces, -1) / count.clamp(min=1)
    members = torch.where(groups.unsqueeze(1), cosine.unsqueeze(2), LOWER_THAN_COSINE)
    maximum = history.maximum(members.flatten(1), LOWER_THAN_COSINE).view(batch, spaces, -1)
    maximum = torch.where(count > 0, maximum, 0.0)
    weights = history.softmax(cosine / 0.1)  # [N, M]
    votes = history.sum((weights.unsqueeze(2) * flags.unsqueeze(1)).flatten(1))
    features = [mean, maximum, votes.view(batch, spaces, -1)]
    return torch.cat(features, dim=2).flatten(1)


def shared_similarity_features(
    cosine: Tensor,  # [M, B, L], of one history of L items that all rows share
    flags: Tensor,  # [L, P]
) -> Tensor:  # [B, M * S]
    """Return `similarity_features` by products with the groups, without a copy for each group."""
    flagged = flags > 0.5
    all_items = torch.ones(flags.shape[0], 1, dtype=torch.bool, device=flags.device)
    groups = torch.cat([all_items, flagged, ~flagged], dim=1).to(cosine.dtype)
    # Products with a few columns are four times as fast if these are contiguous.
    members, lists = groups.T.contiguous(), flags.T.to(cosine.dtype).contiguous()  # [G, L], [P, L]
    count = members.sum(dim=1)  # [G]
    mean = cosine @ members.T / count.clamp(min=1)  # [M, B, G]
    padded = F.pad(cosine, (0, 1), value=LOWER_THAN_COSINE)  # a history may be empty
    # Added, as `torch.where` takes three times as long.
    lowered = (1 - F.pad(members, (0, 1), value=1.0)) * 2 * LOWER_THAN_COSINE  # [G, L + 1]
    maxima = [(padded + offsets).amax(dim=2) for offsets in lowered.unbind()]
    maximum = torch.where(count > 0, torch.stack(maxima, dim=2), 0.0)
    votes = (cosine / 0.1).softmax(dim=2) @ lists.T  # [M, B, P]
    return torch.cat([mean, maximum, votes], dim=2).transpose(0, 1).flatten(1)


def latest_flags(history: JaggedHistory, sizes: Sequence[int]) -> Tensor:  # [N, R]
    """Return a column of flags for each size: whether an item is among the latest `size`."""
    return torch.stack([history.ages < size for size in sizes], dim=1).float()


def num_similarity_features(num_flags: int) -> int:
    """Return S of `similarity_features`."""
    return 2 + 5 * num_flags


def similarity_histogram(cosine: Tensor, history: JaggedHistory, bins: int) -> Tensor:  # [B, bins]
    """Return log(1 + count) of history items in `bins` equal tiers of [-1, 1], without gradient."""
    tier = ((cosine.detach() + 1) * (bins / 2)).long().clamp(0, bins - 1)
    counts = cosine.new_zeros(history.lengths.shape[0] * bins)
    counts = counts.index_add(0, history.rows * bins + tier, torch.ones_like(cosine))
    return torch.log1p(counts).view(-1, bins)


class ContentInterest(nn.Module):
    """Target attention over the history's content, with similarities beside it."""

    kernel = "content_interest"

    def __init__(
        self, dim: int, num_modalities: int, num_parallel: int, settings: HistorySettings
    ) -> None:
        super().__init__()
        num_parallel += len(settings.recent)
        self.attention = DotAttention(dim, num_parallel)
        self.settings = settings
        self.output_dim = dim + settings.simtier_bins
        if settings.similarity_features:
            self.output_dim += (1 + num_modalities) * num_similarity_features(num_parallel)

    @staticmethod
    def from_settings(content: ContentSettings, num_parallel: int) -> ContentInterest:
        return ContentInterest(content.dim, len(content.modalities), num_parallel, content.history)

    def forward(self, content: ContentVectors, history: JaggedHistory, parallel: Tensor) -> Tensor:
        """Return interest and similarity features of each row, [B, output_dim]. A collective."""
        settings, dtype = self.settings, result_dtype(content.target, self.attention.query.weight)
        if settings.recent:
            parallel = torch.cat([parallel, latest_flags(history, settings.recent)], dim=1)
        is_plain = not history.is_shared and not parallel.requires_grad
        may_be_native = is_plain and content.read_stored is not None and not self.kernel_refusal()
        if may_be_native and has_native(content.target, *self.attention.parameters()):
            return self._by_kernel(content, history, parallel).to(dtype)
        items, modalities = content.read_history()
        features = [self.attention(content.target, items, history, parallel)]
        if settings.similarity_features or settings.simtier_bins:
            cosine = cosines(content.target, items, history)
        if settings.similarity_features:
            pairs = zip(content.target_modalities.unbind(dim=1), modalities.unbind(dim=1))
            spaces = [cosine, *(cosines(*vectors, history) for vectors in pairs)]
            if history.is_shared:
                shape = len(spaces), history.lengths.shape[0], history.longest
                lists = history.of_one_row(parallel)
                features.append(shared_similarity_features(torch.stack(spaces).view(shape), lists))
            else:
                stacked = torch.stack(spaces, dim=1)
                features.append(similarity_features(stacked, history, parallel))
        if settings.simtier_bins:
            features.append(similarity_histogram(cosine, history, settings.simtier_bins))
        return torch.cat(features, dim=1).to(dtype)

    def kernel_refusal(self) -> str | None:
        if self.settings.simtier_bins:
            return f"content.history.simtier_bins is {self.settings.simtier_bins}; the kernel has 0"
        if self.settings.mode == "full":
            return "content.history.mode is full; the kernel reads vectors of the bank"
        return None

    def _by_kernel(
        self, content: ContentVectors, history: JaggedHistory, parallel: Tensor
    ) -> Tensor:  # [N, P] -> [B, output_dim]
        """Compute the same as `forward` in float32: q . (M v) as (M^T q) . v. A collective."""
        assert content.read_stored is not None
        attention, stored = self.attention, content.read_stored()
        with torch.autocast("cpu", enabled=False):
            target, matrix = content.target.float(), stored.matrix.float()
            query, list_factors = attention.map_query(target.to(attention.query.weight.dtype))
            queries = [query @ matrix]
            if self.settings.similarity_features:
                queries.append(F.normalize(target, dim=-1) @ matrix)
                queries += F.normalize(content.target_modalities.float(), dim=-1).unbind(dim=1)
            values = parallel[:, : list_factors.shape[1]].float()
            stacked, index, offsets = torch.stack(queries, dim=1), history.index, history.offsets
            sums, features = native_content_interest(
                stacked, stored.rows, matrix, index, offsets, list_factors, values
            )
            if attention.parallel_map is not None:  # sums are of items, then of lists
                matrix = torch.cat([matrix, attention.parallel_map.weight], dim=1)
            return torch.cat([sums @ matrix.T, features], dim=1)
