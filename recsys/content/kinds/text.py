"""Kind `text`: strings, tokenised by the tokenizer of their encoder.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.data.items.item_table import digest_of
from recsys.data.items.item_values import texts_of, tokenize, tokenizer_state
from recsys.data.items.kind import ModalityKind
from recsys.data.parquet.bad_rows import Report

if TYPE_CHECKING:
    from recsys.content.encoders.base import Encoder
    from recsys.content.encoders.pretrained import PretrainedEncoder


class Text(ModalityKind):
    """Texts: an entry is a token id; an item has at most `max_length` of them."""

    column_kind = "text"
    dtype = "int64"

    def check(self) -> None:
        if not self.modality.encoder:
            raise ValueError(
                f"{self.where}: a text needs an `encoder` (hub name, folder or package:NAME)"
            )
        if self.modality.module:
            raise ValueError(f"{self.where}: a text takes no `module`; remove it or change `kind`")
        super().check()

    @cached_property
    def pretrained(self) -> PretrainedEncoder:
        from recsys.content.encoders.pretrained import PretrainedEncoder

        assert self.modality.encoder is not None
        return PretrainedEncoder(self.modality.encoder, self.modality.revision, self.where)

    def key(self) -> Any:
        state = tokenizer_state(self.pretrained.tokenizer)
        return self.modality.max_length, state, self.pretrained.fills_texts

    def entries(self, chunk: pa.Array, where: str, report: Report) -> tuple[np.ndarray, np.ndarray]:
        texts, limit = texts_of(chunk, where, report), self.modality.max_length
        tokens = tokenize(texts, limit, self.pretrained.tokenizer, self.pretrained.fills_texts)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        return lengths, np.fromiter(chain.from_iterable(tokens), np.int64)

    def encoder(self, entry_shape: tuple[int, ...]) -> Encoder:
        from recsys.content.encoders.text_transformer import TextTransformer

        return TextTransformer.load(self.pretrained, self.modality, self.where)

    def preparation_digest(self) -> str:
        from recsys.content.encoders.identity import tokenizer_digest

        return digest_of(tokenizer_digest(self.pretrained.tokenizer), self.pretrained.fills_texts)
