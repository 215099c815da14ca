"""A `transformers` model over token ids.

Shapes: U unique items, T tokens, D width of the encoder.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import masking_utils

from embeddings.host import is_on_host
from recsys.config import ModalitySettings
from recsys.content.encoders.base import ITEMS_PER_GROUP, last_index
from recsys.content.encoders.pretrained import reads_padding
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.items.kind import ContentInput


class TextTransformer(TransformerEncoder):
    """Text model, or text tower of a dual encoder: ids [U, T] -> tokens [U, T or 1, D]."""

    inputs = "texts"
    tower_name, projection_name = "text_model", "text_projection"

    def _read_settings(self, modality: ModalitySettings, where: str) -> None:
        self.max_length = modality.max_length
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None:
            return
        # RoBERTa numbers its positions from the one after the padding id.
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding_id = getattr(table, "padding_idx", None)
        limit = positions - (0 if padding_id is None else padding_id + 1)
        if self.max_length > limit:
            raise ValueError(
                f"{where}.max_length is {self.max_length}; the encoder reads at most {limit} tokens"
            )
        if reads_padding(self.config) and self.max_length != limit:
            raise ValueError(
                f"{where}.max_length is {self.max_length}; an encoder of SigLIP type reads texts "
                f"filled up to {limit} tokens, set {limit}"
            )

    def _sample(self) -> tuple[Tensor, Tensor]:
        device = self.model.device
        length = self.max_length if reads_padding(self.config) else min(self.max_length, 4)
        ids = torch.arange(2 * length, device=device).view(2, length)
        mask = torch.ones(2, length, dtype=torch.bool, device=device)
        if not reads_padding(self.config) and length > 1:
            mask[0, -1] = False
        return self._ended(ids % self.config.vocab_size, mask), mask

    def _ended(self, ids: Tensor, mask: Tensor) -> Tensor:  # [U, T], [U, T] -> [U, T]
        """Put the end token into the last position of each text only; CLIP pools there."""
        end = getattr(self.config, "eos_token_id", None)
        if not isinstance(end, int):
            return ids
        ids = ids.where(ids != end, int(end == 0))
        return ids.scatter(1, last_index(mask).unsqueeze(1), end)

    def _run(self, values: Tensor, mask: Tensor) -> Any:  # [U, T], [U, T]
        # An item without text attends to its padding, or softmax over no token would give NaN; its
        # own mask still marks the result as no token.
        attended = (mask | ~mask.any(dim=1, keepdim=True)).long()
        # transformers reads the values of the mask, which meta tensors do not have.
        if mask.is_meta:
            return self.model(input_ids=values, attention_mask=None)
        # Nothing reads a mask while torch.compile traces, which cannot trace patches.
        is_read = not is_on_host(mask) and not torch.compiler.is_compiling()
        with unread_masks() if is_read else nullcontext():
            return self.model(input_ids=values, attention_mask=attended)

    def _run_above_cut(self, mask: Tensor) -> Any:  # [U, T]
        return self._run(self._ended(torch.zeros_like(mask, dtype=torch.long), mask), mask)

    def _trained(self, content: ContentInput) -> ContentInput:
        """Run each text once, with others of similar length if pooled; equal texts share tokens."""
        # Lengths and contents are unknown on meta; on a GPU to read them would make the host wait.
        if content.mask.is_meta or not is_on_host(content.mask):
            return super()._trained(content)
        first, group = distinct_items(content)
        has_equal = len(first) < len(group)
        content = content[first] if has_equal else content
        tokens = super()._trained(content) if self.pooling == "none" else self._by_length(content)
        return tokens[group] if has_equal else tokens

    def _by_length(self, content: ContentInput) -> ContentInput:
        lengths = content.mask.sum(dim=1)
        order = lengths.argsort()
        outputs = []
        for items in order.split(ITEMS_PER_GROUP):
            longest = max(int(lengths[items[-1]]), 1)
            values, mask = content.values[items, :longest], content.mask[items, :longest]
            outputs.append(super()._trained(ContentInput(values, mask)))
        values = torch.cat([output.values for output in outputs])
        return ContentInput(values, torch.cat([output.mask for output in outputs]))[order.argsort()]


def unread_masks() -> AbstractContextManager[Any]:
    """Keep transformers from reading masks to skip them, which would make the host wait."""
    names = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")
    unread: dict[str, Any] = dict.fromkeys(names, lambda *_, **options: False)
    return patch.multiple(masking_utils, create=True, **unread)  # later versions may not read


def distinct_items(content: ContentInput) -> tuple[Tensor, Tensor]:  # [S], [U]
    """Return the first item of each of S distinct contents, and the content of each item."""
    rows = torch.cat([content.values.flatten(1), content.mask.to(content.values.dtype)], dim=1)
    unique, group = rows.detach().unique(dim=0, return_inverse=True)
    items = torch.arange(len(rows), device=rows.device)
    first = items.new_full((len(unique),), len(rows)).scatter_reduce(0, group, items, "amin")
    return first, group
