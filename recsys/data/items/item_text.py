"""Texts of items -> token ids, in time and memory that do not grow with a text's length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.data.parquet.bad_rows import Report

CHARACTERS_PER_TOKEN = 16  # read first, per token; words of all languages have fewer


def texts_of(chunk: pa.Array, where: str, report: Report) -> list[str | None]:
    """Return the texts of a chunk; one that was reported is None.

    Raises:
        ValueError: the column has another type; `where` names file and column.
    """
    if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
        raise ValueError(f"{where} has type {chunk.type}, expected string; write it with that type")
    try:
        return chunk.to_pylist()
    except UnicodeDecodeError:
        return _decoded(chunk.cast(pa.large_binary()).to_pylist(), report)


def _decoded(encoded: Sequence[bytes | None], report: Report) -> list[str | None]:
    """Decode texts one by one; report those that are not UTF-8."""
    texts: list[str | None] = []
    causes: dict[int, str] = {}
    for row, text in enumerate(encoded):
        try:
            texts.append(None if text is None else text.decode())
        except UnicodeDecodeError as error:
            texts.append(None)
            causes[row] = f"not UTF-8 ({error}); write it in UTF-8, or null for an item without"
    bad = np.array([row in causes for row in range(len(texts))])
    report(bad, "text that is not UTF-8", causes.__getitem__)
    return texts


def tokenize(
    texts: Sequence[str | None], max_length: int, tokenizer: Any, fills: bool = False
) -> list[list[int]]:
    """Return at most `max_length` token ids of each text; none for an empty one.

    With `fills` exactly `max_length`, padding included, for encoders that read it.

    A tokenizer truncates only after it has made all tokens, which takes a second and a quarter of a
    gigabyte for a text of a megabyte. So a text is cut first, far after its last needed token.
    """
    limit = CHARACTERS_PER_TOKEN * max_length
    known = [text for text in texts if text]

    def encode(some: list[str]) -> list[list[int]]:
        return tokenizer(some, truncation=True, max_length=max_length)["input_ids"]

    encoded = encode([text[:limit] for text in known]) if known else []
    for index, text in enumerate(known):
        if len(text) > limit and len(encoded[index]) < max_length:  # long blanks, or no words
            encoded[index] = encode([text])[0]
    if fills:
        padding = tokenizer.pad_token_id
        encoded = [ids + [padding] * (max_length - len(ids)) for ids in encoded]
    tokens = iter(encoded)
    return [next(tokens) if text else [] for text in texts]


def tokenizer_state(tokenizer: Any) -> Any:
    """Return everything that determines how a text is split: vocabulary, normalisation, merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(tokenizer), sorted(tokenizer.get_vocab().items())
    state = json.loads(backend.to_str())
    # The backend stores the arguments of the last call, which are not part of its state.
    return json.dumps({**state, "truncation": None, "padding": None})
