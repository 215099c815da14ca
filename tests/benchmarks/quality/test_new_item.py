"""Places of added items among all and among the new ones, and who took them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.quality.new_item import COPY, Ranking, _takers
from recsys.evaluation.scores import SplitScores, scores_file, write_scores

SCORES = {"a": 0.9, "b": 0.2, f"{COPY}c": 0.5, f"{COPY}d": 0.6}


class FixedScorer:
    """Scores candidates by `SCORES`; notes the histories that it was asked with."""

    schema = SimpleNamespace(group="user", event_columns=["history"], parallel=["history_age"])

    def __init__(self) -> None:
        self.histories: list[dict[str, Any]] = []

    def score(
        self, user: dict[str, Any], history: dict[str, Any], candidates: list[str]
    ) -> np.ndarray:
        self.histories.append({**user, **history})
        return np.array([[SCORES[candidate]] for candidate in candidates])


def test_a_copy_has_a_place_among_all_items_and_among_the_copies() -> None:
    rows = pa.table({"user": ["u", "v"], "history": [["a"], ["b"]], "history_age": [[0.1], [0.2]]})
    scorer = FixedScorer()
    ranking = Ranking(scorer, rows, ["a", "b"], ["c", "d"])  # type: ignore[arg-type]
    np.testing.assert_array_equal(ranking.item_ranks("c", np.array([1])), [[2, 2]])
    np.testing.assert_array_equal(ranking.item_ranks("d", np.array([0])), [[2, 1]])
    assert [history["user"] for history in scorer.histories] == ["v", "u"]
    assert scorer.histories[0]["history_age"] == [0.2]


def test_takers_are_positive_rows_of_unseen_items_the_most_taken_first(tmp_path: Path) -> None:
    rows = pa.table({"item": ["a", "b", "c", "b", "a"]})
    counts, labels = np.array([0, 0, 5, 0, 0]), np.array([[1.0], [1], [1], [1], [0]], np.float32)
    ids = np.arange(5)
    scores = SplitScores(ids, ids, ids, counts, labels, labels, ("played",))
    write_scores(scores, scores_file(tmp_path, "test"))
    takers = _takers(tmp_path, rows, "item")
    assert {item: indices.tolist() for item, indices in takers.items()} == {"b": [1, 3], "a": [0]}
    assert list(takers) == ["b", "a"]

    seen_scores = SplitScores(ids, ids, ids, counts + 1, labels, labels, ("played",))
    write_scores(seen_scores, scores_file(tmp_path, "test"))
    with pytest.raises(ValueError, match="no positive row"):
        _takers(tmp_path, rows, "item")
