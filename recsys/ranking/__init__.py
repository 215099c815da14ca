"""Ranking models: ID vectors and content vectors -> logits; `ranking.name` names one of them."""

from recsys.config.ranking import RANKING_MODELS as RANKING_MODELS
