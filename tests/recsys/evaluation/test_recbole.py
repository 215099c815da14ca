"""Metrics of RecBole's SASRec are the same by RecBole's evaluator and by ours.

RecBole is no dependency: where it cannot be imported, the test is left out.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.evaluation.retrieval import SeenItems, count_above, retrieval_metrics

metrics = pytest.importorskip("recbole.evaluator.metrics", reason="RecBole is not installed")
collector = pytest.importorskip("recbole.evaluator.collector", reason="RecBole is not installed")
models = pytest.importorskip(
    "recbole.model.sequential_recommender.sasrec", reason="RecBole is not installed"
)

NUM_ITEMS, NUM_USERS, LENGTH = 120, 400, 12
DEPTHS = [1, 10, 50]
CONFIG: dict[str, Any] = {
    "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "length",
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "NEG_PREFIX": "neg_",
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 16,
    "inner_size": 32,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.5,
    "loss_type": "CE",
    "device": "cpu",
    "metrics": ["Hit", "Recall", "NDCG", "MRR"],
    "topk": DEPTHS,
    "metric_decimal_place": 12,
    "eval_args": {"mode": "full"},
}


@pytest.mark.parametrize("excludes_seen", [False, True])
def test_both_evaluators_agree_on_a_sasrec_of_recbole(
    excludes_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "float", float, raising=False)  # RecBole reads the alias of old NumPy
    torch.manual_seed(0)
    model = models.SASRec(CONFIG, SimpleNamespace(num=lambda _: NUM_ITEMS + 1)).eval()
    lengths = torch.randint(1, LENGTH + 1, (NUM_USERS,))
    histories = torch.randint(1, NUM_ITEMS + 1, (NUM_USERS, LENGTH))  # 0 is padding
    histories[torch.arange(LENGTH) >= lengths.unsqueeze(1)] = 0
    targets = torch.randint(1, NUM_ITEMS + 1, (NUM_USERS,))
    rows = {"item_list": histories, "length": lengths}
    with torch.no_grad():
        scores = model.full_sort_predict(rows).view(NUM_USERS, -1)
        queries, vectors = model(histories, lengths), model.item_embedding.weight[1:]
    scores[:, 0] = -torch.inf
    if excludes_seen:  # as RecBole does, which never has a target among them
        is_target = histories == targets.unsqueeze(1)
        scores.scatter_(1, histories.masked_fill(is_target, 0), -torch.inf)
    evaluator = collector.Collector(CONFIG)
    evaluator.eval_batch_collect(scores, None, torch.arange(NUM_USERS), targets)
    collected = evaluator.get_data_struct()
    theirs: dict[str, float] = {}
    for name in CONFIG["metrics"]:
        theirs |= getattr(metrics, name)(CONFIG).calculate_metric(collected)

    skip = SeenItems(histories[histories > 0], lengths) if excludes_seen else None
    items = torch.arange(1, NUM_ITEMS + 1)
    above, tied = count_above(
        queries, vectors[targets - 1], targets, items, vectors, excluded=[skip] if skip else []
    )
    ours = retrieval_metrics(above, tied, depths=DEPTHS)

    for depth in DEPTHS:
        for name, their_name in (("recall", "hit"), ("recall", "recall"), ("ndcg", "ndcg")):
            expected = pytest.approx(theirs[f"{their_name}@{depth}"], abs=1e-6)
            assert ours[f"{name}@{depth}"] == expected, name
        assert ours[f"mrr@{depth}"] == pytest.approx(theirs[f"mrr@{depth}"], abs=1e-6)
    assert 0.02 < ours["ndcg@10"] < ours["ndcg@50"] < 1
