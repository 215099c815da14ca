"""Similarities of items: by users (item-CF), order, texts (TF-IDF) and outputs of encoders.

Item-CF is item-based collaborative filtering (Sarwar et al., WWW 2001): the cosine of the items'
users, times n / (n + SIGNIFICANCE) for n users of both (Herlocker et al., SIGIR 1999). Transitions
are sequential rules (Ludewig and Jannach, UMUAI 2018): pairs of an item and one that followed it,
which count less with each step between them, scaled and shrunk as item-CF is. TF-IDF
weighs a word by (1 + log of its count) * (1 + log((1 + I) / (1 + items with it))), and an item's
vector has length one (Salton and Buckley, 1988).

Shapes: N events, H items of their histories, I items, W words, K neighbours, V width of all
modalities.
"""

import re
from collections.abc import Iterable
from itertools import chain, starmap

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, vstack

from recsys.build import Job
from recsys.content.encoders.base import Encoder, mean_token
from recsys.data.items.item_table import ItemColumnReader, ItemTable
from recsys.data.items.item_values import texts_of
from recsys.serving.retrieval.catalogue import unit

SIGNIFICANCE = 10
MAX_STEPS = 10  # from an item to one that follows it
STEP_DECAY = 0.8  # of the weight of a pair with each step
PAIR_SIGNIFICANCE = 3
MAX_EVENTS = 1000  # latest events of a user: the cost of their pairs grows with the square
WORD = re.compile(r"\w\w+")
PRODUCTS_PER_BLOCK = 2**24  # of items with all items, in memory at a time
ITEMS_PER_CALL = 1024  # of the encoders


def user_similarities(users: np.ndarray, items: np.ndarray, num_items: int) -> csr_matrix:
    """Return the shrunk cosines [I, I] of items [N] by their users [N]; equal pairs count once."""
    order = np.argsort(users, kind="stable")
    users, items = users[order], items[order]
    later = np.searchsorted(users, users, side="right") - 1 - np.arange(len(users))
    users, items = users[later < MAX_EVENTS], items[later < MAX_EVENTS]
    number = np.unique(users, return_inverse=True)[1]
    ones = np.ones(len(items), np.float32)
    interactions = csr_matrix(
        (ones, (number, items)), shape=(number.max(initial=-1) + 1, num_items)
    )
    interactions.data[:] = 1  # repeated pairs were added up
    common = (interactions.T @ interactions).tocsr()
    common.setdiag(0)
    common.eliminate_zeros()
    return _scaled(common, np.asarray(interactions.sum(axis=0)).ravel(), SIGNIFICANCE)


def pair_weights(
    histories: np.ndarray, lengths: np.ndarray, targets: np.ndarray, num_items: int
) -> csr_matrix:  # int64 [H], oldest first, -1: no item; int64 [N]; int64 [N] -> [I, I]
    """Return the summed weights of pairs of an item (row) and one that followed it (column)."""
    steps = np.repeat(lengths.cumsum(), lengths) - 1 - np.arange(len(histories))
    pair_targets = np.repeat(targets, lengths)
    is_pair = (steps < MAX_STEPS) & (histories >= 0) & (histories != pair_targets)
    weights = (STEP_DECAY ** steps[is_pair].astype(np.float64)).astype(np.float32)
    cells = histories[is_pair], pair_targets[is_pair]
    return csr_matrix((weights, cells), shape=(num_items, num_items))


def transitions(pairs: csr_matrix, counts: np.ndarray) -> csr_matrix:
    """Scale and shrink `pair_weights` by the events of the items, int64 [I] -> float32 [I, I]."""
    return _scaled(pairs, counts, PAIR_SIGNIFICANCE).astype(np.float32)


def _scaled(pairs: csr_matrix, counts: np.ndarray, significance: int) -> csr_matrix:
    shrunk = pairs.tocsr(copy=True)
    shrunk.data = shrunk.data**2 / (shrunk.data + significance)
    scale = diags(1 / np.sqrt(np.maximum(counts, 1)))
    return (scale @ shrunk @ scale).tocsr()


def item_texts(table: ItemTable) -> list[str] | None:  # [I], by ascending id
    """Return all text columns of each item as one text; None if the items have no such column.

    A text column of another type is a ValueError.
    """
    columns = [name for name, column in table.items.columns.items() if column.kind == "text"]
    if not columns:
        return None
    texts = [""] * table.num_rows
    for name in columns:
        values = chain.from_iterable(starmap(texts_of, ItemColumnReader(table, name).chunks()))
        texts = [f"{text} {value or ''}" for text, value in zip(texts, values, strict=True)]
    return [texts[row] for row in table.rows[np.argsort(table.ids)]]


def text_vectors(texts: Iterable[str]) -> csr_matrix:  # float32 [I, W]
    """Return the TF-IDF vectors of texts; a text without words has a vector of zeros."""
    vocabulary: dict[str, int] = {}
    columns, lengths = [], []
    for text in texts:
        tokens = WORD.findall(text.lower())
        columns += [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]
        lengths.append(len(tokens))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ones = np.ones(len(columns), np.float32)
    counts = csr_matrix((ones, (rows, columns)), shape=(len(lengths), len(vocabulary)))
    counts.sum_duplicates()
    num_items = np.bincount(counts.indices, minlength=len(vocabulary))
    counts.data = 1 + np.log(counts.data)
    weighted = counts @ diags(1 + np.log((1 + len(lengths)) / (1 + num_items)))
    norms = np.sqrt(np.asarray(weighted.power(2).sum(axis=1)).ravel())
    return (diags(1 / np.maximum(norms, 1e-12)) @ weighted).tocsr().astype(np.float32)


def nearest(vectors: csr_matrix, count: int) -> csr_matrix:  # [I, W] -> float32 [I, I]
    """Return the `count` highest products of each item with other items."""
    blocks, transposed = [], vectors.T.tocsc()
    size = max(PRODUCTS_PER_BLOCK // vectors.shape[0], 1)
    for start in range(0, vectors.shape[0], size):
        products = (vectors[start : start + size] @ transposed).toarray()
        row = np.arange(len(products))
        products[row, start + row] = 0
        width = min(count, products.shape[1])
        columns = np.argpartition(-products, width - 1, axis=1)[:, :width]
        values = np.take_along_axis(products, columns, axis=1)
        cells = np.repeat(row, width), columns.ravel()
        blocks.append(csr_matrix((values.ravel(), cells), shape=products.shape))
    joined = vstack(blocks, format="csr")
    joined.eliminate_zeros()
    return joined


@torch.no_grad()
def encoder_means(job: Job, rows: np.ndarray) -> np.ndarray:  # int64 [I] -> float32 [I, V]
    """Return the mean output tokens of a job's encoders for items, of unit length by modality."""
    branch, store = job.em3.content, job.store
    assert branch is not None and store is not None
    blocks = []
    for start in range(0, len(rows), ITEMS_PER_CALL):
        content, means = store.gather(rows[start : start + ITEMS_PER_CALL]), []
        for name, encoder in branch.encoders.items():
            assert isinstance(encoder, Encoder)
            tokens = encoder.encode(content[name])
            means.append(unit(mean_token(tokens.values, tokens.mask).float().numpy()))
        blocks.append(np.concatenate(means, axis=1))
    return np.concatenate(blocks)
