"""A package of a model with several histories, and ids beside their events, scores as `predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recsys.config import ContentSettings
from recsys.serving import Scorer
from tests.recsys.ranking.backbone_runs import Content, backbone_config
from tests.recsys.serving.serving_runs import HISTORY_COLUMNS, exported, requests
from tests.several_histories import write_several_histories

FURTHER = ("bought", "bought_shop", "bought_price", "searched")
COLUMNS = (*HISTORY_COLUMNS, "history_shop", *FURTHER)


@pytest.mark.parametrize(
    ("backbone", "content"),
    [
        pytest.param("din", "concat", marks=pytest.mark.long),
        pytest.param("dlrm", "none", marks=pytest.mark.long),
        pytest.param("hstu", "qformer", marks=pytest.mark.long),
        pytest.param("transformer", "none", marks=pytest.mark.long),
        ("two_tower", "none"),
    ],
)
def test_scores_equal_those_of_predict(tmp_path: Path, backbone: str, content: Content) -> None:
    data = write_several_histories(tmp_path / "data")
    config = backbone_config(tmp_path, backbone, content)
    if isinstance(config.content, ContentSettings):
        history = replace(config.content.history, columns=["bought"])
        config = replace(config, content=replace(config.content, history=history))
    package, predicted = exported(tmp_path, config)
    scorer = Scorer.load(package)

    scores = [scorer.score(**request) for request in requests(data, COLUMNS)]

    np.testing.assert_allclose(np.concatenate(scores), predicted, rtol=0, atol=1e-6)
    assert len(np.unique(predicted)) > len(predicted) / 2
    request = next(requests(data, COLUMNS))
    together = scorer.score(request["user"], request["history"], range(30))
    alone = [scorer.score(request["user"], request["history"], [item]) for item in range(30)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-6)
    assert np.isfinite(scorer.score(request["user"], (), [7])).all()
    with pytest.raises(ValueError, match="'bought'"):
        scorer.score(request["user"], {name: [] for name in COLUMNS if name != "bought"}, [7])
    with pytest.raises(ValueError, match=r"'bought_price'.*'bought'"):
        scorer.score(request["user"], {**request["history"], "bought_price": [1.0] * 9}, [7])
