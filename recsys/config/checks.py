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
    _check_averages(config)
    if config.neighbours is not None and isinstance(config.ranking, RetrievalSettings):
        raise ValueError(
            "neighbours are blended with logits, and a retrieval model ranks by vectors alone; set "
            "neighbours to null"
        )
    content, temperature = content_settings(config.content), config.contrastive.temperature
    if content is None:
        return
    if config.contrastive.weight > 0 and not 0 < temperature < math.inf:
        raise ValueError(f"contrastive.temperature is {temperature}; it must be > 0 and finite")
    retrieval = softmax_settings(config.ranking)
    if retrieval and retrieval.loss == "sampled_softmax" and content.history.mode == "full":
        raise ValueError(
            "ranking.loss sampled_softmax reads the content of its negatives from the memory bank, "
            "which content.history.mode full has not; choose bank_lora, bank_frozen or bank_dense"
        )


def _check_averages(config: Config) -> None:
    """Refuse averages of tables without a decay, or whose current rows are not in one place."""
    if not config.optimizer.ema_tables:
        return
    if config.optimizer.ema_decay is None:
        raise ValueError(
            "optimizer.ema_tables is true, but optimizer.ema_decay is not set; give a decay, such "
            "as 0.98"
        )
    table_settings, copies = config.embedding.tables, config.embedding.parallel.copies
    cached = [name for name, settings in table_settings.items() if settings.kernel == "uvm_caching"]
    if cached or copies > 1:
        what = f"embedding.tables.{cached[0]}.kernel is uvm_caching" if cached else ""
        raise ValueError(
            "optimizer.ema_tables reads tables in place in each step, but "
            f"{what or f'embedding.parallel.copies is {copies}'}; set ema_tables to false"
        )
