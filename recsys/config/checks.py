"""Checks of a configuration that concern several of its components."""

from __future__ import annotations

import math

from recsys.config.limits import check_settings
from recsys.config.ranking import RetrievalSettings, softmax_settings
from recsys.config.run import Config, content_settings


def validate(config: Config) -> None:
    """Check every setting by itself, then settings that exclude each other.

    Raises:
        ValueError: names the conflicting settings, and the limit or a valid value.
    """
    check_settings(config)
    if config.best_model_by in ("recall", "ndcg") and not isinstance(
        config.ranking, RetrievalSettings
    ):
        raise ValueError(
            f"best_model_by {config.best_model_by} needs a retrieval model, and ranking.name is "
            f"{config.ranking.name}; choose two_tower, or best_model_by auc, gauc or auc_and_gauc"
        )
    content, temperature = content_settings(config), config.contrastive.temperature
    if content is None:
        return
    # An unused temperature may have any value.
    if config.contrastive.weight > 0 and not 0 < temperature < math.inf:
        raise ValueError(f"contrastive.temperature is {temperature}; it must be > 0 and finite")
    retrieval = softmax_settings(config.ranking)
    if retrieval and retrieval.loss == "sampled_softmax" and content.history.mode == "full":
        raise ValueError(
            "ranking.loss sampled_softmax reads the content of its negatives from the memory bank, "
            "which content.history.mode full has not; choose bank_lora, bank_frozen or bank_dense"
        )
