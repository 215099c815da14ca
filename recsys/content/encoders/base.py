"""The interface of all encoders: the content of unique items -> tokens for the fusion.

Shapes: U unique items, G items of a group, T tokens, D width of the encoder.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from recsys.content.encoders.identity import EncoderIdentity
from recsys.data.items.images import ImagePreparation
from recsys.data.items.kind import ContentInput

Pooling = Literal["mean", "cls", "last", "none", "projected"]


def mean_token(tokens: Tensor, mask: Tensor) -> Tensor:  # [U, T, D], [U, T] -> [U, D]
    """Return the mean of the tokens that the mask keeps; zero for an item without tokens."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def last_index(mask: Tensor) -> Tensor:  # [U, T] -> [U]
    """Return the index of the last token; 0 for an item without tokens."""
    return (mask.sum(dim=1) - 1).clamp(min=0)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> ContentInput:
    """Return hidden states [U, T, D] as tokens (`none`), or the first (`cls`), last or mean one."""
    if pooling == "none":
        return ContentInput(hidden, mask)
    if pooling == "cls":
        token = hidden[:, 0]
    elif pooling == "last":
        token = hidden[torch.arange(len(hidden), device=hidden.device), last_index(mask)]
    else:
        token = mean_token(hidden, mask)
    return ContentInput(token.unsqueeze(1), mask.any(dim=1, keepdim=True))


ITEMS_PER_GROUP = 32
SHORT_LENGTHS = (8, 16, 24, 32)
# Texts are padded to one of these lengths (48, 64, 96, 128 ... after the short ones).
PADDED_LENGTHS = (*SHORT_LENGTHS, *(length << power for power in range(32) for length in (48, 64)))


def _group(content: ContentInput, items: Tensor, length: int | None) -> ContentInput:
    """Return G items, the last repeated as often as needed; texts padded to a `length`."""
    missing = ITEMS_PER_GROUP - len(items)
    items = torch.cat([items, items[-1:].expand(missing)]).to(content.mask.device)
    group = content[items]
    if length is None:
        return group
    padding = (0, length - content.mask.shape[1])  # padded, or shortened where negative
    return ContentInput(pad(group.values, padding), pad(group.mask, padding))


def _merge(outputs: list[tuple[Tensor, ContentInput]], mask: Tensor, width: int) -> ContentInput:
    counts = [int(output.mask.sum(dim=1).max()) for _, output in outputs]
    token_mask = mask.new_zeros(len(mask), max([1, *counts]))
    values = torch.zeros(*token_mask.shape, width, device=mask.device)
    for (items, output), count in zip(outputs, counts, strict=True):
        items = items.to(mask.device)
        tokens, has_token = output.values[:, :count], output.mask[:, :count]
        values[items, :count] = tokens.masked_fill(~has_token.unsqueeze(-1), 0)
        token_mask[items, :count] = has_token
    return ContentInput(values, token_mask)


@dataclass(frozen=True)
class CacheReport:
    """Report on the cache of a frozen part."""

    folder: Path
    items: int  # with content
    num_bytes: int
    encoded: int  # by all ranks in this job
    seconds: float  # to look up, encode and write


class Encoder(nn.Module):
    """Interface of all encoders.

    Example::

        from recsys.content.encoders.build import Encoder
        from recsys.data.batch import ContentInput

        class Doubled(Encoder):
            def __init__(self):
                super().__init__()
                self.output_dim, self.caches = 4, False

            def forward(self, content):  # values [U, T, 4]
                return ContentInput(2 * content.values, content.mask)
    """

    output_dim: int  # D of the tokens
    frozen_tokens: int = 1  # tokens that `frozen` returns for one image
    frozen_dtype: torch.dtype = torch.float32  # float16 if an item has several final tokens
    caches: bool  # whether `frozen` computes anything, so that caching pays
    max_length: int = 1  # most tokens of a text; 1 for images
    is_cached: bool = False  # whether batches already carry the outputs of `frozen`
    cache_report: CacheReport | None = None
    identity: EncoderIdentity | None = None  # origin of its weights, if it has any

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []  # sentences for the user

    @cached_property
    def frozen_dim(self) -> int:
        """Width of the outputs of `frozen`; default: `output_dim`."""
        return self.output_dim

    @property
    def trained_modules(self) -> list[nn.Module]:
        """Modules that gradients pass and that run in every step."""
        return []

    def frozen_settings(self) -> Any:
        """Return all settings that determine the outputs of `frozen`, in printable form."""
        return None

    def encode(self, content: ContentInput) -> ContentInput:
        """Run both parts: content of a batch -> tokens [U, T, D] and their mask [U, T]."""
        return cast(ContentInput, self(self.above_frozen(content)))

    def above_frozen(self, content: ContentInput) -> ContentInput:
        """Return the input of `forward`: the outputs of `frozen`, unless a cache has given them."""
        return self.frozen_outputs(content) if self.caches and not self.is_cached else content

    @torch.no_grad()
    def frozen_outputs(self, content: ContentInput) -> ContentInput:
        """Return the outputs of `frozen` [U, T, D]; an item's bits do not depend on its batch."""
        outputs = self._run_in_groups(content)
        values = outputs.values.to(self.frozen_dtype)
        if self.frozen_dtype == torch.float16 and not values.isfinite().all():
            name = type(self).__name__ if self.identity is None else self.identity.name
            raise ValueError(
                f"encoder '{name}': a token has the value {float(outputs.values.abs().max()):.3g}, "
                "and tokens are kept in float16, up to 65504; use a `pooling` with one token"
            )
        return ContentInput(values, outputs.mask)

    @torch.compiler.disable  # a compiled part would differ from the cache in the last bits
    def _run_in_groups(self, content: ContentInput) -> ContentInput:
        """Run `frozen`, so that each item has the same output in any batch.

        The shape of a computation decides the last bits of its sums. So `frozen` gets G items at a
        time, and a text is padded to a length that depends on its own length alone.
        Token ids [U, T] or pixels [U, 3, H, W] -> tokens [U, T, D], zero where the mask is False.
        """
        lengths, is_text = content.mask.sum(dim=1).cpu(), content.values.dim() == 2
        shapes = torch.ones_like(lengths)
        if is_text:
            steps = sorted({min(length, self.max_length) for length in PADDED_LENGTHS})
            shapes = torch.tensor(steps)[torch.bucketize(lengths, torch.tensor(steps))]
        outputs: list[tuple[Tensor, ContentInput]] = []
        with torch.autocast(content.values.device.type, enabled=False):
            for shape in shapes[lengths > 0].unique().tolist():
                indices = torch.where((shapes == shape) & (lengths > 0))[0]
                for items in indices.split(ITEMS_PER_GROUP):
                    group = _group(content, items, shape if is_text else None)
                    outputs.append((items, self.frozen(group)[: len(items)]))
        return _merge(outputs, content.mask, self.frozen_dim)

    def drop_frozen_layers(self) -> None:
        self.is_cached = True

    def frozen(self, content: ContentInput) -> ContentInput:
        """Run the frozen part, whose output never changes; the identity if there is none."""
        return content

    def forward(self, content: ContentInput) -> ContentInput:
        """Run the layers above `frozen` and return tokens [U, T, D] and their mask [U, T]."""
        raise TypeError(f"{type(self).__name__} defines no forward")


class StoredFeatures(Encoder):
    """Encoder of stored features, which are tokens already: [U, 1, D] -> [U, 1, D].

    Example::

        from recsys.content.encoders.build import StoredFeatures

        assert StoredFeatures(output_dim=6).frozen_dim == 6
    """

    caches = False

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim

    def forward(self, content: ContentInput) -> ContentInput:
        return content


def normalize_pixels(pixels: Tensor, preparation: ImagePreparation) -> Tensor:
    """Return pixels, uint8 [U, 3, H, W], as float32, normalised as the encoder expects."""
    statistics = torch.tensor([preparation.mean, preparation.std], device=pixels.device)
    mean, std = statistics.view(2, 1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std
