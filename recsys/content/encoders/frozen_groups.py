"""Runs the frozen part of an encoder so that an item's output is the same in every batch.

Floating-point sums depend on the shape of the whole computation: the padded length of a text and
the number of items determine the kernel, and the same item in another batch differs by up to
1e-5. So the frozen part always runs in groups of one size, each text padded to a length that
depends on its own length alone. The output of an item then does not depend on the other items, on
their order or on the number of threads, and cached outputs equal to the last bit those of a step
on the same kind of processor.

Shapes: U unique items, G items of a group, T tokens, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.data.items.content_input import ContentInput

ITEMS_PER_GROUP = 32
# Small multiples of 8; after these 48, 64, 96, 128 ...
SHORT_LENGTHS = (8, 16, 24, 32)


def padded_lengths(lengths: Tensor, longest: int) -> Tensor:  # [U] -> [U]
    """Return the length that each text is padded to, at most `longest`, the encoder's limit."""
    steps = [length for length in SHORT_LENGTHS if length < longest]
    power = 2 * SHORT_LENGTHS[-1]
    while power * 3 // 4 < longest:
        steps += [length for length in (power * 3 // 4, power) if length < longest]
        power *= 2
    steps.append(longest)
    places = torch.bucketize(lengths, torch.tensor(steps))
    return torch.tensor(steps)[places]


@torch.compiler.disable  # a compiled part would differ from the cache in the last bits
def run_in_groups(
    run: Callable[[ContentInput], ContentInput], content: ContentInput, longest: int, width: int
) -> ContentInput:
    """Run `run` on the items of `content`; each item has the same output in any batch.

    Args:
        run: the frozen part; called with G items at a time, all of which have content.
        content: token ids [U, T] or pixels [U, 3, H, W], and their mask.
        longest: maximum number of tokens of a text.
        width: D of the outputs of `run`.

    Returns:
        Tokens [U, T, D], zero where the mask [U, T] is False; T is the longest of them, at least 1.
    """
    lengths = content.mask.sum(dim=1).cpu()
    is_text = content.values.dim() == 2
    shapes = padded_lengths(lengths, longest) if is_text else torch.ones_like(lengths)
    outputs: list[tuple[Tensor, ContentInput]] = []
    with torch.autocast(content.values.device.type, enabled=False):
        for shape in shapes[lengths > 0].unique().tolist():
            for items in torch.where((shapes == shape) & (lengths > 0))[0].split(ITEMS_PER_GROUP):
                group = _group(content, items, shape if is_text else None)
                outputs.append((items, run(group)[: len(items)]))
    return _together(outputs, content.mask, width)


def _group(
    content: ContentInput,
    items: Tensor,  # [at most G]
    length: int | None,  # of the padded texts; None for images
) -> ContentInput:
    """Return G items: the given ones, the last repeated as often as needed; texts padded."""
    missing = ITEMS_PER_GROUP - len(items)
    items = torch.cat([items, items[-1:].expand(missing)]).to(content.mask.device)
    values, mask = content.values[items], content.mask[items]
    if length is not None:
        values, mask = values[:, :length], mask[:, :length]
        values = pad(values, (0, length - values.shape[1]))
        mask = pad(mask, (0, length - mask.shape[1]))
    return ContentInput(values, mask)


def _together(
    outputs: list[tuple[Tensor, ContentInput]],
    mask: Tensor,  # [U, T] of the input
    width: int,
) -> ContentInput:
    """Return the groups' outputs in the order of the items, padded with zeros like a cache's."""
    counts = [int(output.mask.sum(dim=1).max()) for _, output in outputs]
    longest = max([1, *counts])
    values = torch.zeros(len(mask), longest, width, device=mask.device)
    known = torch.zeros(len(mask), longest, dtype=torch.bool, device=mask.device)
    for (items, output), count in zip(outputs, counts, strict=True):
        items = items.to(mask.device)
        tokens, present = output.values[:, :count], output.mask[:, :count]
        values[items, :count] = tokens.masked_fill(~present.unsqueeze(-1), 0)
        known[items, :count] = present
    return ContentInput(values, known)
