"""Similarities of items equal sets of users, and TF-IDF by hand."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix

from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.serving.retrieval import nearest_items
from recsys.serving.retrieval.nearest_items import (
    item_texts,
    nearest,
    pair_weights,
    text_vectors,
    transitions,
    user_similarities,
)
from recsys.storage.location import Location
from tests.recsys.serving.retrieval.test_baselines import events, similarity


def test_similarities_are_shrunk_cosines_by_users() -> None:
    expected = [[similarity(first, second) for second in range(5)] for first in range(5)]
    np.testing.assert_allclose(user_similarities(*events(), 5).toarray(), expected, rtol=1e-6)


def test_the_last_events_of_a_user_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_items, "MAX_EVENTS", 2)
    users, items = np.array([7, 8, 7, 8, 7]), np.array([0, 3, 1, 4, 2])
    shared = user_similarities(users, items, 5).toarray() > 0
    assert np.argwhere(shared).tolist() == [[1, 2], [2, 1], [3, 4], [4, 3]]


def test_a_pair_counts_less_with_each_step_from_an_item_to_one_that_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearest_items, "MAX_STEPS", 3)
    histories = np.array([4, 0, -1, 1, 0, 1])  # of [], [4, 0, none, 1] and [0, 1]
    pairs = pair_weights(histories, np.array([0, 4, 2]), np.array([3, 2, 0]), 5).toarray()
    expected = np.zeros((5, 5))
    expected[0, 2], expected[1, 2] = 0.8**2, 1  # item 4 is too far back, and -1 no item
    expected[1, 0] = 1  # item 0 does not follow itself
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)


def test_transitions_are_shrunk_and_scaled_by_the_events_of_both_items() -> None:
    pairs = csr_matrix(np.array([[0, 2.0], [1, 0]]))
    expected = [[0, 4 / 5 / math.sqrt(9 * 4)], [1 / 4 / math.sqrt(4 * 9), 0]]
    np.testing.assert_allclose(transitions(pairs, np.array([9, 4])).toarray(), expected, rtol=1e-6)
    assert pairs[0, 1] == 2


SCHEMA = """
target_item: item
group: item
columns: {item: {kind: id, num_embeddings: 9}, liked: {kind: label}}
items: {id: item, columns: {title: {kind: text}, tags: {kind: text}}}
"""


def test_texts_of_all_columns_are_joined_by_item_and_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    (tmp_path / "items").mkdir()
    root = Location.of(tmp_path)
    columns = {"item": [5, 2], "title": ["red", None], "tags": ["ink", "old"]}
    pq.write_table(pa.table(columns), tmp_path / "items" / "0.parquet")
    texts = item_texts(ItemTable(root, load_schema(root)))
    assert texts is not None and [text.split() for text in texts] == [["old"], ["red", "ink"]]
    columns["tags"] = [["ink"], ["old"]]  # type: ignore[list-item]
    pq.write_table(pa.table(columns), tmp_path / "items" / "0.parquet")
    with pytest.raises(ValueError, match=r"column 'tags' has type list.* expected string"):
        item_texts(ItemTable(root, load_schema(root)))


def test_a_rare_word_counts_more_and_a_repeated_one_by_its_logarithm() -> None:
    vectors = text_vectors(["Red, red house", "red ink", "", "a ink"]).toarray()
    red, house = (1 + math.log(2)) * (1 + math.log(5 / 3)), 1 + math.log(5 / 2)
    length = math.hypot(red, house)
    np.testing.assert_allclose(vectors[0], [red / length, house / length, 0], rtol=1e-6)
    np.testing.assert_allclose(vectors[1], [0.5**0.5, 0, 0.5**0.5], rtol=1e-6)
    assert vectors[2].tolist() == [0, 0, 0] and vectors[3].tolist() == [0, 0, 1]


def test_vectors_are_those_of_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["a red house", "red ink red", "", "the house of ink"]
    vectorizer = text.TfidfVectorizer(sublinear_tf=True)
    expected = vectorizer.fit_transform(texts)
    np.testing.assert_allclose(
        (text_vectors(texts) @ text_vectors(texts).T).toarray(),
        (expected @ expected.T).toarray(),
        atol=1e-6,
    )


def test_the_nearest_items_are_those_of_the_full_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_items, "PRODUCTS_PER_BLOCK", 3 * 7)
    vectors = csr_matrix(np.random.default_rng(0).random((7, 4)))  # without ties
    products = (vectors @ vectors.T).toarray()
    np.fill_diagonal(products, 0)
    for count in (1, 3, 7):
        lowest = -np.sort(-products, axis=1)[:, [count - 1]]
        expected = np.where(products >= lowest, products, 0)
        np.testing.assert_allclose(nearest(vectors, count).toarray(), expected, rtol=1e-6)
