"""Read and check values of item columns: categories, features, texts; find equal content.

Shapes: n rows of a chunk, U unique items, T tokens, W values of a token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embeddings.vocabulary.fixed import is_id_type
from recsys.data.parquet.bad_rows import Report
from recsys.data.parquet.values import is_list, list_lengths

if TYPE_CHECKING:
    from recsys.data.items.kind import ContentInput

CHARACTERS_PER_TOKEN = 16  # texts are cut to this length per token; words are mostly shorter
MAJORITY = 0.5  # a larger share of items with equal content is reported


def category_lists(values: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """Return the number of categories of each row, int64 [n], and the categories of all rows."""
    has_lists = is_list(values.type)
    kind = values.type.value_type if has_lists else values.type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_null(kind) or is_id_type(kind)):
        raise ValueError(
            f"{where} of kind category has type {values.type}, expected integer or string, or a "
            "list of them; write it so"
        )
    if not has_lists:
        return np.ones(len(values), np.int64), values
    return list_lengths(values).astype(np.int64), values.flatten()


def feature_tokens(chunk: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """Return the number of tokens of each row [n], and all tokens [T] as lists of floats.

    A number is a token of width 1, a list of floats is one token; null and empty rows have none.
    """
    kind = chunk.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = chunk.drop_null().cast(pa.float64(), safe=False)
        return np.asarray(chunk.is_valid(), np.int64), pa.FixedSizeListArray.from_arrays(values, 1)
    is_nested = is_list(kind) and is_list(kind.value_type)
    value = kind.value_type if is_list(kind) else kind
    value = value.value_type if is_nested else value
    if not is_list(kind) or not pa.types.is_floating(value):
        raise ValueError(
            f"{where} has type {kind}, expected a number, list<float> or list<list<float>>; "
            "write one of them"
        )
    lengths = list_lengths(chunk)
    if is_nested:
        return lengths, chunk.flatten()
    return (lengths > 0).astype(np.int64), chunk.filter(pa.array(lengths > 0))


def usable_features(
    lengths: np.ndarray, tokens: pa.Array, width: int, report: Report
) -> tuple[np.ndarray, np.ndarray]:  # lengths [n], tokens [T] -> [n], float32 [T, W]
    """Report rows with tokens of another width or bad values; return lengths and usable tokens."""
    rows = np.repeat(np.arange(len(lengths)), lengths)  # of each token
    widths = list_lengths(tokens)
    bad = np.bincount(rows[widths != width], minlength=len(lengths)) > 0
    wrong_width = widths[(widths != width).argmax()] if bad.any() else width
    unlike = f"a feature has {wrong_width} values, earlier ones have {width}"
    fix = "write all of one width, or null for an item without"
    report(bad, f"a feature of other than {width} values", lambda row: f"{unlike}; {fix}")
    usable = ~bad[rows]
    rows, tokens = rows[usable], tokens.filter(pa.array(usable))
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and are reported
        flat = tokens.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(len(tokens), width)
    wrong = ~np.isfinite(values).all(axis=1)
    not_finite = np.bincount(rows[wrong], minlength=len(lengths)) > 0
    problem = "a value that is null or not finite"
    unusable = f"a feature has {problem}; write null for an item without"
    report(not_finite, f"a feature with {problem}", lambda row: unusable)
    usable = ~not_finite[rows]
    return np.bincount(rows[usable], minlength=len(lengths)), values[usable]


def texts_of(chunk: pa.Array, where: str, report: Report) -> list[str | None]:
    """Return the texts of a chunk; report texts that are not UTF-8 and replace them by None."""
    if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
        raise ValueError(f"{where} has type {chunk.type}, expected string; write it with that type")
    try:
        return chunk.to_pylist()
    except UnicodeDecodeError:
        pass
    texts, causes = list[str | None](), dict[int, str]()
    for row, encoded in enumerate(chunk.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(None if encoded is None else encoded.decode())
        except UnicodeDecodeError as error:
            texts.append(None)
            causes[row] = f"not UTF-8 ({error}); write it in UTF-8, or null for an item without"
    bad = np.array([row in causes for row in range(len(texts))])
    report(bad, "text that is not UTF-8", causes.__getitem__)
    return texts


def tokenize(
    texts: Sequence[str | None], max_length: int, tokenizer: Any, fills: bool = False
) -> list[list[int]]:
    """Return up to `max_length` token ids of each text; an empty text has none.

    `fills` pads to `max_length`. Long texts are cut before they are tokenised.
    """
    limit = CHARACTERS_PER_TOKEN * max_length
    non_empty = [text for text in texts if text]

    def encode(batch: list[str]) -> list[list[int]]:
        return tokenizer(batch, truncation=True, max_length=max_length)["input_ids"]

    encoded = encode([text[:limit] for text in non_empty]) if non_empty else []
    for index, text in enumerate(non_empty):
        if len(text) > limit and len(encoded[index]) < max_length:  # the cut text was too short
            encoded[index] = encode([text])[0]
    if fills:
        padding = tokenizer.pad_token_id
        encoded = [ids + [padding] * (max_length - len(ids)) for ids in encoded]
    tokens = iter(encoded)
    return [next(tokens) if text else [] for text in texts]


def tokenizer_state(tokenizer: Any) -> Any:
    """Return the state that determines tokens: vocabulary, normalisation, merges; for a hash."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(tokenizer), sorted(tokenizer.get_vocab().items())
    state = json.loads(backend.to_str())
    # The backend stores the arguments of the last call, which are not part of its state.
    return json.dumps({**state, "truncation": None, "padding": None})


def digests_of(content: ContentInput) -> list[bytes]:  # values [U, T, ...], mask [U, T]
    """Return a hash of each item's entries, without items that have no entries."""
    values, mask = content.values, content.mask
    if values.shape[:2] != mask.shape:  # pixels of one image per item, [U, 3, H, W]
        values = values.unsqueeze(1)
    rows = zip(values, mask, strict=True)
    entries = (values[mask].numpy().tobytes() for values, mask in rows if mask.any())
    return [hashlib.blake2b(entry, digest_size=8).digest() for entry in entries]


def share_of_most_common(values: Sequence[Hashable]) -> float:
    """Return the share of the values that equal the most frequent one; 0 without values."""
    ((_, count),) = Counter(values).most_common(1) or [(None, 0)]
    return count / max(len(values), 1)


def is_mostly_equal(share: float, num_items: int) -> bool:
    """Return whether too many items have equal content, which cannot distinguish them."""
    return num_items > 1 and share > MAJORITY


def shared_beginning(texts: Sequence[str]) -> int:
    """Return the length of the longest prefix that more than `MAJORITY` of the texts share."""
    ordered = sorted(texts)
    distance = int(MAJORITY * len(ordered))  # texts between the first and the last of them
    if not distance:
        return 0
    return max(len(commonprefix(pair)) for pair in zip(ordered, ordered[distance:]))  # noqa: RUF071
