"""Kind `terms`: the words of a text, or its tags, each with an embedding.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from unicodedata import category, normalize

import numpy as np
import pyarrow as pa

from embeddings import HashVocabulary
from recsys.data.items.item_values import texts_of
from recsys.data.items.kind import ModalityKind
from recsys.data.parquet.bad_rows import Report

if TYPE_CHECKING:
    from recsys.content.encoders.base import Encoder


@cache
def word_pattern() -> re.Pattern[str]:
    r"""Return the pattern of a word: `\w` alone would end it before an accent or a vowel sign."""
    marks = [char for char in map(chr, range(sys.maxunicode + 1)) if category(char)[0] == "M"]
    return re.compile(rf"\w[\w{''.join(marks)}]*")


class Terms(ModalityKind):
    """Terms in lower case and NFC: an entry is a row of the table of embeddings, by a hash.

    An item has at most `max_length` terms: the first ones, each once.
    """

    column_kind = "text"
    dtype = "int64"

    def check(self) -> None:
        if self.modality.encoder or self.modality.module:
            raise ValueError(
                f"{self.where}: terms have an embedding table in place of an encoder; remove "
                "`encoder` and `module`, or change `kind`"
            )
        if self.modality.training not in ("frozen", "full"):
            raise ValueError(
                f"{self.where}: embeddings of terms are `training: frozen` or `full`, not "
                f"{self.modality.training}"
            )
        if self.modality.separator == "":
            raise ValueError(
                f"{self.where}: separator is empty; give characters, or null for words"
            )
        super().check()

    def key(self) -> Any:
        modality = self.modality
        return modality.max_length, modality.separator, modality.num_embeddings, "NFC"

    def entries(self, chunk: pa.Array, where: str, report: Report) -> tuple[np.ndarray, np.ndarray]:
        texts = [self.terms(text or "") for text in texts_of(chunk, where, report)]
        terms = pa.array(chain.from_iterable(texts), pa.large_string())
        rows = HashVocabulary(self.modality.num_embeddings).rows_of(terms)[:, 0]
        return np.array([len(text) for text in texts], np.int64), rows

    def terms(self, text: str) -> list[str]:
        """Return the distinct terms of a text in their order, at most `max_length`."""
        separator, text = self.modality.separator, normalize("NFC", text.lower())
        if separator is None:
            raw_terms = word_pattern().findall(text)
        else:
            raw_terms = re.split(f"[{re.escape(separator)}]", text)
        distinct = dict.fromkeys(filter(None, map(str.strip, raw_terms)))
        return list(distinct)[: self.modality.max_length]

    def encoder(self, entry_shape: tuple[int, ...]) -> Encoder:
        from recsys.content.encoders.terms import TermEncoder

        modality = self.modality
        trains = modality.training == "full"
        return TermEncoder(modality.num_embeddings, modality.embedding_dim, trains)
