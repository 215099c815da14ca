"""Ranking models: ID vectors and content vectors -> logits.

`RANKING_MODELS` has those of the package; `ranking.name: package.module:Class` names your own.
"""

from recsys.config.ranking import RANKING_MODELS as RANKING_MODELS
