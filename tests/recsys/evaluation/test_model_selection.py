"""What chooses the best of a run's validated models."""

from __future__ import annotations

import pytest

from recsys.checkpoint.compatibility import check_config
from recsys.config import BestModelBy, load_config, to_plain
from recsys.evaluation.model_selection import METRICS, selection_score, selection_words
from tests.recsys.command_runs import TINY

REPORT = {"auc": 0.75, "gauc": 0.5, "retrieval": {"recall@10": 0.25, "ndcg@10": 0.125}}


@pytest.mark.parametrize(
    ("best_model_by", "score", "words"),
    [
        ("auc", 0.75, "AUC"),
        ("gauc", 0.5, "GAUC"),
        ("auc_and_gauc", 0.625, "mean of AUC and GAUC"),
        ("recall", 0.25, "RECALL@10"),
        ("ndcg", 0.125, "NDCG@10"),
    ],
)
def test_a_model_is_chosen_by_the_mean_of_the_metrics_named(
    best_model_by: BestModelBy, score: float, words: str
) -> None:
    assert selection_score(REPORT, best_model_by) == score
    assert selection_words(best_model_by) == words


@pytest.mark.parametrize("best_model_by", METRICS)
def test_a_metric_that_is_not_defined_chooses_nothing(best_model_by: BestModelBy) -> None:
    names = [name for of in METRICS.values() for name in of]
    report = {name: None if name in METRICS[best_model_by] else 0.5 for name in names}
    assert selection_score(report, best_model_by) is None
    assert selection_score({}, best_model_by) is None


def test_a_run_does_not_go_on_by_another_choice() -> None:
    stored = to_plain(load_config(TINY))
    with pytest.raises(ValueError, match=r"best_model_by \(checkpoint: auc, now: gauc"):
        check_config(stored, load_config(TINY, ["--best_model_by", "gauc"]), "checkpoint")
