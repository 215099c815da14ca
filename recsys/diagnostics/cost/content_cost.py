"""FLOPs and least bytes of the content branch: encoders, projections, fusion, bank, history map.

Each unique item is encoded once, what is frozen has no gradient of its weights, and no gradient is
taken of inputs that need none. Letters: see `recsys.content.fusion`.
"""

from __future__ import annotations

from collections.abc import Iterator

from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.model_sizes import ContentSizes, EncoderSizes
from recsys.diagnostics.cost.work import PartCost, Work, linear, moved, times


def content_parts(content: ContentSizes, counts: BatchCounts) -> Iterator[PartCost]:
    """From the content of the items to encode to the vectors of target and history."""
    yield encoders(content, counts)
    yield projections(content, counts)
    if content.is_qformer:
        yield fusion(content, counts)
    else:
        yield concatenation(content, counts)
    if content.mode != "full":
        read = counts.stored + counts.unique_history
        kept = (counts.encoded + read) * (content.vector_dim + 1)
        yield PartCost("memory bank", "content", moved(2 * kept))
    yield history_map(content, counts)


def encoders(content: ContentSizes, counts: BatchCounts) -> PartCost:
    forward, backward = Work(), Work()
    for encoder in content.encoders:
        if encoder.frozen_layers + encoder.trained_layers:
            tokens, pairs = _encoded_tokens(encoder, counts)
            share = counts.with_gradient / max(counts.encoded, 1)
            forward += _transformer(encoder, tokens, pairs)
            backward += times(_transformer_backward(encoder, tokens, pairs), share)
    return PartCost("encoders", "encoders", forward, backward)


def _encoded_tokens(encoder: EncoderSizes, counts: BatchCounts) -> tuple[float, float]:
    """Tokens that the layers run on, padding included, and pairs of tokens of one item."""
    tokens = counts.modalities[encoder.name]
    if encoder.groups_by_length:
        return tokens.grouped, tokens.grouped_pairs
    length = encoder.image_tokens or tokens.longest
    return counts.encoded * length, counts.encoded * length**2


def _layer(encoder: EncoderSizes, tokens: float, pairs: float) -> tuple[Work, Work, Work]:
    """(products of the inputs, the other products, attention) of one layer, forward."""
    hidden = encoder.hidden
    inputs = times(linear(tokens, hidden, hidden), 3)
    others = linear(tokens, hidden, hidden) + times(linear(tokens, hidden, encoder.intermediate), 2)
    return inputs, others, Work(others=4 * hidden * pairs)


def _adapters(encoder: EncoderSizes, tokens: float) -> Work:
    return times(linear(tokens, encoder.hidden, encoder.lora_rank), 2 * encoder.lora_targets)


def _transformer(encoder: EncoderSizes, tokens: float, pairs: float) -> Work:
    layers = encoder.frozen_layers + encoder.trained_layers
    inputs, others, attention = _layer(encoder, tokens, pairs)
    weights = 4 * encoder.hidden**2 + 2 * encoder.hidden * encoder.intermediate
    work = times(inputs + others + attention + moved(weights), layers)
    work += times(_adapters(encoder, tokens), encoder.trained_layers)
    return work + moved(2 * tokens * encoder.hidden)


def _transformer_backward(encoder: EncoderSizes, tokens: float, pairs: float) -> Work:
    """Of the trained layers; the input of the lowest needs no gradient where it is adapted."""
    layers = encoder.trained_layers
    inputs, others, attention = _layer(encoder, tokens, pairs)
    weights = 4 * encoder.hidden**2 + 2 * encoder.hidden * encoder.intermediate
    if not encoder.lora_rank:
        return times(times(inputs + others + attention, 2) + moved(3 * weights), layers)
    work = times(others + times(attention, 2) + moved(weights), layers) + times(inputs, layers - 1)
    down = linear(tokens, encoder.hidden, encoder.lora_rank)
    unneeded = times(down, encoder.lora_targets)  # gradient of the lowest adapters' inputs
    adapters = times(_adapters(encoder, tokens), 2 * layers)
    adapters = Work(products=adapters.products - unneeded.products)
    return work + adapters + moved(2 * tokens * encoder.hidden)


def projections(content: ContentSizes, counts: BatchCounts) -> PartCost:
    forward, backward = Work(), Work()
    for encoder in content.encoders:
        tokens, trained = _tokens(encoder, counts)
        sizes = encoder.dim, content.dim
        forward += linear(tokens, *sizes)
        forward += moved(tokens * sum(sizes) + encoder.dim * content.dim)
        directions = 2 if encoder.trains else 1
        backward += times(linear(trained, *sizes), directions)
        backward += moved(trained * sum(sizes) * directions + encoder.dim * content.dim)
    return PartCost("projections", "content", forward, backward)


def _tokens(encoder: EncoderSizes, counts: BatchCounts) -> tuple[float, float]:
    """Tokens that a modality gives the fusion, and those of items with gradient."""
    per_item = 1.0
    if not encoder.pooled:
        per_item = encoder.image_tokens or counts.modalities[encoder.name].longest
    return counts.encoded * per_item, counts.with_gradient * per_item


def fusion(content: ContentSizes, counts: BatchCounts) -> PartCost:
    """Joint self-attention over queries and tokens; `modern` has a feed-forward and a linear path.

    Of the last layer's outputs only those of the queries are computed.
    """
    dim, items, queries = content.dim, counts.encoded, content.num_queries
    tokens = sum(_tokens(encoder, counts)[0] for encoder in content.encoders)
    length = queries + tokens / max(items, 1)  # T
    of_outputs = 2 + 8 * content.is_modern  # D x D products: query, output, feed-forward
    forward = linear(items, queries * dim, dim)
    for layer in range(1, content.num_layers + 1):
        outputs = queries if layer == content.num_layers else length
        forward += times(linear(items * length, dim, dim), 2)  # key and value
        forward += times(linear(items * outputs, dim, dim), of_outputs)
        forward += Work(others=4 * length * outputs * dim * items)
    weights = (content.num_layers * (2 + of_outputs) + queries) * dim**2
    share = counts.with_gradient / max(items, 1)
    backward = times(times(forward, 2) + moved(2 * items * (length + 1) * dim), share)
    forward += moved(items * (length + 1) * dim + weights)
    backward += moved(2 * weights)
    if content.is_modern:
        linear_path = _linear_path(content, counts)
        forward, backward = forward + linear_path[0], backward + linear_path[1]
    return PartCost("fusion", "fusion", forward, backward)


def concatenation(content: ContentSizes, counts: BatchCounts) -> PartCost:
    """The mean token of each modality, and one linear map of them side by side."""
    vectors = content.dim * (len(content.encoders) + 1)
    forward, backward = _linear_path(content, counts)
    forward += moved(counts.encoded * vectors)
    backward += moved(2 * counts.with_gradient * vectors)
    return PartCost("fusion", "fusion", forward, backward)


def _linear_path(content: ContentSizes, counts: BatchCounts) -> tuple[Work, Work]:
    """Forward and backward of the means and their map; bytes are those of its weights alone."""
    dim, num_modalities = content.dim, len(content.encoders)
    width = dim * num_modalities
    tokens, trained = map(sum, zip(*(_tokens(encoder, counts) for encoder in content.encoders)))
    forward = linear(counts.encoded, width, dim) + moved(width * dim)
    backward = times(linear(counts.with_gradient, width, dim), 2) + moved(2 * width * dim)
    means = 2 * num_modalities * dim  # of a token, whose weight needs no gradient
    return forward + Work(others=means * tokens), backward + Work(others=means * trained)


def history_map(content: ContentSizes, counts: BatchCounts) -> PartCost:
    """Over the unique items of the histories; vectors from the bank need no gradient."""
    dim, items, rank = content.dim, counts.unique_history, content.lora_rank
    forward, vectors = linear(items, dim, dim), items * dim
    backward = Work()
    if content.mode == "bank_dense":
        backward = linear(items, dim, dim) + moved(2 * vectors + dim**2)
    if content.mode == "full":
        backward = times(linear(items, dim, dim), 2) + moved(3 * vectors + 2 * dim**2)
    if content.mode == "bank_lora":
        low = linear(items, dim, rank)
        forward += times(low, 2)
        backward = times(low, 3) + moved(2 * vectors + 2 * dim * rank)
    return PartCost("history map", "content", forward + moved(2 * vectors + dim**2), backward)
