"""Score a target by similar items of the history: kernel regression, and votes.

Kernel regression: a user's values deviate from the user's and the items' means by w . z plus noise.
z is an item's vector. w is normal, so its mean has a closed form, which does not count similar
history items twice (Rasmussen and Williams 2006, equation 2.11). z joins factors of the items'
co-occurrence with a trained map of their content, which new items have, too.
Votes: means of the values, weighted by similarity (item-based collaborative filtering, Sarwar et
al. 2001), for each of several similarities: by users, by values, and by each modality's content.
Shapes: B batch, R rows with a history of their own (B, or 1 if all rows share one), K targets of
such a row (1, or B if all rows share one), L longest history, U unique history items, N history
items of the batch, I items, D width of a vector, Z width of the joined z, F folds of users,
P parallel lists, S similarities, M modalities, C labels, E numbers of evidence. A block of rows
has B and R of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from embeddings.host import is_on_host
from recsys.config import ContentSettings, NeighbourSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch, Rows
from recsys.data.jagged_history import JaggedHistory
from recsys.ranking.layers.evidence import LATEST, EvidenceNetwork, RidgePredictions
from recsys.ranking.vectors import InputDimensions, Logits

# Subsets of events. In training, rows of block b read statistics of the rows of earlier blocks, and
# rows that are in no order of time those of users outside their fold.
FOLDS = 5
PRIOR_VALUES = 5.0  # pseudo-count: values of 0 added to every mean of deviations
# Added to sums of similarities to the powers 1, 2 and 4, to shrink votes of few or weak neighbours.
SUM_OFFSETS = (0.15, 0.0125, 1e-4)
BLOCK_ROWS = 64  # rows of a block on CPU
# Weight of a history item by its age in items. Training would choose a decay of 0.6 to 1.2, which
# follows the drift of a user's level and ranks worse within users.
DECAY_AGE, DECAY = 10, 0.5
# Number of evidence columns to blend, the first ones; the ranking model knows more of the others.
NUM_BLENDED = 4
Vectors = tuple[Tensor, Tensor]  # of the targets [B, D], and of the items of histories [R, L, D]


@dataclass
class NeighbourEvidence:
    """The output of `Neighbours` for a batch."""

    batch: Batch  # with votes among its dense features
    evidence: Tensor  # [B, E], the columns of `layers.evidence.EVIDENCE`, without gradient
    regression: Tensor  # [B, C], of the evidence alone, by a linear map
    logits: Tensor  # [B, C], the regression plus an MLP


@dataclass
class BlendedLogits:
    """Logits of the ranking model and of the evidence, and their blend."""

    network: Logits  # [B, C], of the ranking model, or of its members in training
    network_logits: Tensor  # [B, C], the same or the members' mean
    neighbours: NeighbourEvidence
    logits: Tensor  # [B, C], blended


class Blend(nn.Module):
    """Logits as a linear function of the ranking model's logits, the evidence's, and the evidence.

    Its weights are fitted on rows that the model was not trained on (stacking, Wolpert 1992), since
    ID vectors remember training rows. Until then it returns the ranking model's logits.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        weight = torch.zeros(num_labels, 2 + NUM_BLENDED)
        weight[:, 0] = 1
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(num_labels))

    def forward(self, scored: Logits, neighbours: NeighbourEvidence) -> BlendedLogits:
        network = scored if isinstance(scored, Tensor) else scored.logits
        logits = self.logits(network.float(), neighbours.logits.float(), neighbours.evidence)
        return BlendedLogits(scored, network, neighbours, logits)

    def logits(
        self, network: Tensor, evidence_logits: Tensor, evidence: Tensor
    ) -> Tensor:  # [B, C], [B, C], [B, E] -> [B, C]
        models = network * self.weight[:, 0] + evidence_logits * self.weight[:, 1]
        return models + evidence[:, :NUM_BLENDED] @ self.weight[:, 2:].T + self.bias


class Neighbours(nn.Module):
    """Evidence and votes of the history for the target, and the blend of both with other logits.

    `cooccurrence` has factors of the similarity of items by their users, `taste` by the users'
    values. For each item, buffers have F statistics without one fold's users, and one of all users.
    In training the share `dropout` of targets counts as new, and has evidence of content alone.
    """

    item_row_buffers = ("cooccurrence", "taste", "value_sums", "value_counts")

    cooccurrence: Tensor
    taste: Tensor
    value_sums: Tensor
    value_counts: Tensor
    value_mean: Tensor
    value_deviation: Tensor
    block_starts: Tensor
    least_sums: Tensor

    def __init__(
        self,
        settings: NeighbourSettings,
        dimensions: InputDimensions,
        content: ContentSettings | None,
    ) -> None:
        super().__init__()
        self.column = _value_column(settings, dimensions)
        self.dropout, num_items, dim = settings.dropout, dimensions.num_items, settings.dim
        valued = 0 if self.column is None else num_items
        self.register_buffer("cooccurrence", torch.zeros(num_items, FOLDS + 1, dim))
        taste = torch.zeros(valued, FOLDS + 1, settings.taste_dim, dtype=torch.float16)
        self.register_buffer("taste", taste)
        self.register_buffer("value_sums", torch.zeros(num_items, FOLDS + 1))  # of deviations
        self.register_buffer("value_counts", torch.zeros(num_items, FOLDS + 1))
        offsets = torch.tensor(SUM_OFFSETS).view(3, 1, 1)
        self.register_buffer("least_sums", offsets, persistent=False)
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_deviation", torch.ones(()))
        # Positions of the first training row of each block, -1 if users are in folds.
        self.register_buffer("block_starts", torch.full((FOLDS,), -1))
        self.content_map: nn.Linear | None = None
        num_similarities = 1 + (valued > 0)
        if content is not None:
            self.content_map = _leading_components(len(content.modalities), content.dim, dim)
            num_similarities += len(content.modalities)
        # Logarithms of the kernel's shares of co-occurrence, content and taste, and of the noise.
        self.log_shares = nn.Parameter(torch.tensor([0.0, -2.0, -1.0][: 2 + (valued > 0)]))
        self.log_noise = nn.Parameter(torch.tensor(-1.0))
        self.network = EvidenceNetwork(num_similarities, dimensions)
        self.blend = Blend(dimensions.num_labels)

    def forward(
        self,
        content: ContentVectors | None,
        batch: Batch,
        newness: Tensor | None = None,  # [B], in [0, 1); targets below `dropout` count as new
    ) -> NeighbourEvidence:
        """Return evidence and votes of each row. A collective in training, and with content."""
        targets, fold = batch.target.items, torch.full_like(batch.target.items, FOLDS)
        if self.training:
            fold = self._training_folds(batch.rows)
        if newness is not None:
            targets = targets.masked_fill(newness < self.dropout, len(self.cooccurrence))
        vectors = None
        if self.content_map is not None:
            assert content is not None
            vectors = _Content.read(content, self.content_map)
        blocks = _blocks(batch.history.jagged())
        outputs = [self._read(batch, vectors, targets, fold, block) for block in blocks]
        evidence, votes, list_means = (_in_order(columns, blocks) for columns in zip(*outputs))
        weights = batch.rows.loss_weights
        regression, logits = self.network(evidence, votes, list_means, weights)
        batch = replace(batch, dense_features=torch.cat([batch.dense_features, votes[:, 0]], dim=1))
        return NeighbourEvidence(batch, evidence.detach(), regression, logits)

    def _read(
        self, batch: Batch, content: _Content | None, targets: Tensor, fold: Tensor, block: _Block
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, E], [B, S, NUM_VOTES], [B, W * P]
        targets, fold = block.take(targets), block.take(fold)
        if content is not None:
            unit_target = block.take(content.unit_target, dim=1)
            content = replace(content, target=block.take(content.target), unit_target=unit_target)
        history, target_rows = self._history(batch, fold, block), self._item_rows(targets, fold)
        vectors = self._item_vectors(history.rows, target_rows)
        mean, variance = self._regression(content, history, vectors)
        item_mean, count = self._item_means(target_rows)
        shared = [stat.expand_as(mean) for stat in (history.user_mean, torch.log1p(history.length))]
        evidence = torch.stack([mean, variance, item_mean, torch.log1p(count), *shared], dim=1)
        votes = self._votes(content, history, vectors)
        return evidence, votes, history.list_means().expand(targets.shape[0], -1)

    def _training_folds(self, rows: Rows) -> Tensor:  # int64 [B]
        block = torch.searchsorted(self.block_starts, rows.positions, right=True) - 1
        has_blocks = self.block_starts[0] >= 0
        return torch.where(has_blocks, block.clamp(min=0), rows.groups.remainder(FOLDS))

    def _item_rows(self, items: Tensor, fold: Tensor) -> _Rows:
        last = len(self.cooccurrence) - 1
        return _Rows(items.clamp(max=last) * (FOLDS + 1) + fold, (items <= last).float())

    def _history(self, batch: Batch, fold: Tensor, block: _Block) -> _History:
        mask, length = block.mask, block.mask.sum(dim=1)
        numbers = batch.history.recorded_values[block.positions] * mask.unsqueeze(2)
        user_mean, deviations = torch.zeros_like(length), mask
        if self.column is not None:  # otherwise all values are 1, of which no mean is subtracted
            values = (numbers[:, :, self.column] - self.value_mean) / self.value_deviation * mask
            user_mean = values.sum(dim=1) / (length + PRIOR_VALUES)
            deviations = (values - user_mean.unsqueeze(1)) * mask
        items = batch.history.items[block.index]
        rows = self._item_rows(items, fold[: items.shape[0]].unsqueeze(1))
        if not block.is_shared:  # only packages have items that were added later
            rows = _Rows(rows.index, None)
        age = length.unsqueeze(1) - mask.cumsum(dim=1)
        weights = mask * (1 + age / DECAY_AGE) ** -DECAY
        return _History(block, rows, age, weights, numbers, deviations, length, user_mean)

    def _item_vectors(self, event_rows: _Rows, target_rows: _Rows) -> list[Vectors]:
        """Return vectors by co-occurrence and, with values, by taste; in evaluation as float32."""
        buffers = [self.cooccurrence] + ([] if self.column is None else [self.taste])
        dtypes = [buffer.dtype if self.training else torch.float32 for buffer in buffers]
        return [
            (target_rows.gather(buffer, dtype), event_rows.gather(buffer, dtype))
            for buffer, dtype in zip(buffers, dtypes)
        ]

    def _regression(
        self, content: _Content | None, history: _History, vectors: list[Vectors]
    ) -> tuple[Tensor, Tensor]:  # [B], [B]
        item_mean, _ = self._item_means(history.rows)
        residuals = (history.deviations - item_mean) * history.block.mask
        shares, dim = self.log_shares.exp(), self.cooccurrence.shape[2]
        terms = [
            (share, target[:, :dim].float(), events[:, :, :dim].float())
            for share, (target, events) in zip(shares[::2], vectors)
        ]
        fixed = torch.cat([events for _, _, events in terms], dim=2)
        events = fixed[:, :, :0]
        # Kernels of a target [B], and of a history's items [R, L], with themselves.
        target_kernel = sum(share * _squared_lengths(target) for share, target, _ in terms)
        event_kernel = sum(share * _squared_lengths(events) for share, _, events in terms)
        if content is not None:
            events = embedding(history.block.index, content.events)
            lengths = content.events.square().sum(1)[history.block.index]
            target_kernel = target_kernel + shares[1] * content.target.square().sum(1)
            event_kernel = event_kernel + shares[1] * lengths
            terms.append((shares[1], content.target, events))
        prior = torch.cat([share.expand(target.shape[1]) for share, target, _ in terms])
        target = torch.cat([target for _, target, _ in terms], dim=1)
        # Variance that an item's vector does not explain counts as noise of history items.
        event_variance, target_variance = (
            (shares.sum() - kernel).clamp(min=0) for kernel in (event_kernel, target_kernel)
        )
        precisions = history.weights / (self.log_noise.exp() + event_variance)
        columns = target.T.unsqueeze(0) if history.block.is_shared else target.unsqueeze(2)
        ridge = RidgePredictions(fixed, events, residuals, precisions, columns, prior)
        mean, variance = ridge.fast() if self.training else ridge.exact()
        return mean, variance + target_variance

    @torch.no_grad()
    def _votes(
        self, content: _Content | None, history: _History, vectors: list[Vectors]
    ) -> Tensor:  # [B, S, NUM_VOTES]
        """Return votes on the target by each similarity, that of `taste` first.

        Votes are means of the values weighted by the powers 1, 2 and 4 of similarity, their sum
        weighted by similarity, and the logarithm of 1 + sum of similarities.
        """
        similarity = self._similarities(content, history.block, vectors)  # [R, S, K, L]
        deviations = history.deviations * history.weights
        positive = similarity.clamp(min=0)
        square = positive.square()
        powers = [positive, square, square.square()]
        weighted = torch.stack([deviations, history.weights], 1).mT  # [R, L, 2], of fast strides
        if history.block.is_shared:
            sums = torch.stack([power @ weighted[0] for power in powers], dim=1)
        else:
            stacked = torch.stack(powers, dim=1)  # [R, 3, S, K, L]
            sums = (stacked.flatten(1, 3) @ weighted).unflatten(1, stacked.shape[1:4])
        means = sums[..., 0] / (sums[..., 1] + self.least_sums)  # [R, 3, S, K]
        signed = (similarity.flatten(1, 2) @ deviations.unsqueeze(2)).view(similarity.shape[:3])
        signed = signed / (history.length + 1).sqrt()[:, None, None]
        counts = torch.log1p(sums[:, 0, ..., 1])
        votes = torch.stack([*means.unbind(1), signed, counts], dim=-1)  # [R, S, K, NUM_VOTES]
        return votes.transpose(1, 2).flatten(0, 1)

    def _similarities(
        self, content: _Content | None, block: _Block, vectors: list[Vectors]
    ) -> Tensor:  # [R, S, K, L]
        if block.is_shared:  # each position holds an item
            products = [target @ events[0].T for target, events in reversed(vectors)]
            similarity = torch.stack(products).float()
            if content is not None:
                events = content.unit_events.index_select(1, block.index[0])  # [M, L, D]
                similarity = torch.cat([similarity, content.unit_target @ events.mT])
            return similarity.unsqueeze(0)
        columns = [events @ target.unsqueeze(2) for target, events in reversed(vectors)]
        similarity = torch.stack(columns).float()  # [S, R, L, K]
        if content is not None:
            events = content.unit_events.index_select(1, block.index.flatten())
            events = events.unflatten(1, block.index.shape)  # [M, R, L, D]
            similarity = torch.cat([similarity, events @ content.unit_target.unsqueeze(3)])
        return similarity.permute(1, 0, 3, 2) * block.mask[:, None, None]

    def _item_means(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return the mean deviation and the number of values of items, without a fold's users."""
        buffers = self.value_sums, self.value_counts
        sums, counts = (rows.gather(statistics.unsqueeze(2)).squeeze(-1) for statistics in buffers)
        return sums / (counts + PRIOR_VALUES), counts


@dataclass
class _Block:
    """Rows of a batch that are computed together."""

    rows: Tensor | None  # int64 [B], of the batch, or None for all rows in their order
    positions: Tensor  # int64 [R, L], of the history items among all N, padded with 0
    index: Tensor  # int64 [R, L], of the history items among the batch's unique items
    mask: Tensor  # [R, L], 1 for each item
    is_shared: bool  # whether all rows of the batch have one history

    def take(self, values: Tensor, dim: int = 0) -> Tensor:
        return values if self.rows is None else values.index_select(dim, self.rows)


@dataclass
class _Content:
    """Vectors of content: mapped from all modalities, and each modality's, of length 1."""

    target: Tensor  # [B, D]
    events: Tensor  # [U, D]
    unit_target: Tensor  # [M, B, D]
    unit_events: Tensor  # [M, U, D]

    @staticmethod
    def read(content: ContentVectors, content_map: nn.Linear) -> _Content:
        """Read and map the vectors of all items. A collective."""
        pair = content.target_modalities.float(), content.read_history()[1].float()
        units = (normalize(raw.detach(), dim=-1).transpose(0, 1).contiguous() for raw in pair)
        return _Content(*(content_map(raw.flatten(1)) for raw in pair), *units)


@dataclass
class _Rows:
    """Rows of items in statistics [I, F + 1, D]."""

    index: Tensor  # int64
    has_row: Tensor | None  # 0 for items without one; None if all items have one

    def gather(self, statistics: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # [..., D]
        rows = embedding(self.index, statistics.flatten(0, 1)).to(dtype)
        return rows if self.has_row is None else rows * self.has_row.unsqueeze(-1).to(dtype)


@dataclass
class _History:
    """Histories of a block, padded with 0."""

    block: _Block
    rows: _Rows  # [R, L], of the items in statistics
    age: Tensor  # [R, L], number of later items
    weights: Tensor  # [R, L], lower for older items
    numbers: Tensor  # [R, L, P], of the parallel lists
    deviations: Tensor  # [R, L], values less the user's mean, in standard deviations of all
    length: Tensor  # [R]
    user_mean: Tensor  # [R]

    def list_means(self) -> Tensor:  # [R, W * P]
        latest = torch.stack([(self.age < count) * self.block.mask for count in LATEST], dim=1)
        sums = latest @ self.numbers
        return (sums / latest.sum(dim=2, keepdim=True).clamp(min=1)).flatten(1)


def _in_order(tensors: tuple[Tensor, ...], blocks: list[_Block]) -> Tensor:
    orders = [block.rows for block in blocks if block.rows is not None]
    return torch.cat(tensors)[torch.cat(orders).argsort()] if orders else tensors[0]


def _squared_lengths(vectors: Tensor) -> Tensor:  # [..., D] -> [...]
    return torch.linalg.vector_norm(vectors, dim=-1).square()


def _blocks(history: JaggedHistory) -> list[_Block]:
    """Return the rows as blocks of similar length, which need little padding and fit CPU caches.

    On a GPU, and in an exported graph, which takes rows of one length, all rows are one block.
    """
    positions = torch.arange(history.index.shape[0], device=history.index.device)
    if history.is_shared:
        positions = history.of_one_row(positions.unsqueeze(1)).T
        mask = torch.ones_like(positions, dtype=torch.float32)
    else:
        positions, ones = history.padded(positions, 0), torch.ones_like(positions)
        mask = history.padded(ones, 0).float()
        if not torch.compiler.is_exporting() and not history.index.shape[0]:
            positions, mask = positions[:, :0], mask[:, :0]  # there is no item to pad with
    is_one_block = history.is_shared or not is_on_host(positions) or torch.compiler.is_exporting()
    if is_one_block or not positions.numel():
        return [_Block(None, positions, history.index[positions], mask, history.is_shared)]
    blocks = []
    for rows in history.lengths.argsort(stable=True).split(BLOCK_ROWS):
        longest = max(int(history.lengths[rows[-1]]), 1)
        chunk = positions[rows, :longest]
        blocks.append(_Block(rows, chunk, history.index[chunk], mask[rows, :longest], False))
    return blocks


def _leading_components(num_modalities: int, content_dim: int, dim: int) -> nn.Linear:
    """Return a map that begins with the first components of each modality's mean token."""
    linear = nn.Linear(num_modalities * content_dim, dim, bias=False)
    rows = torch.arange(min(dim, num_modalities * content_dim))
    with torch.no_grad():
        linear.weight.zero_()
        columns = rows % num_modalities * content_dim + rows // num_modalities
        linear.weight[rows, columns] = dim**-0.5
    return linear


def _value_column(settings: NeighbourSettings, dimensions: InputDimensions) -> int | None:
    if not dimensions.has_history:
        raise ValueError(
            "neighbours are items of a history, and schema.yaml has no column of kind sequence; "
            "set neighbours to null"
        )
    if not dimensions.num_items:
        raise ValueError(
            "neighbours: rows of a bounded vocabulary pass from item to item, and statistics would "
            "stay with the row; set neighbours to null, or use a vocabulary of kind exact"
        )
    names, values = dimensions.parallel_names, settings.values
    if values is not None and values not in names:
        raise ValueError(
            f"neighbours.values is '{values}'; the lists of numbers beside the history in "
            f"schema.yaml are {list(names)}"
        )
    return None if values is None else names.index(values)
