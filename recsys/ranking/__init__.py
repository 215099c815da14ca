"""Ranking models: ID vectors and content vectors -> logits.

`RANKING_MODELS` maps the values of `ranking.name` to the models of the package. A class of your own
needs no entry: `ranking.name: package.module:Class` names it.
"""

from recsys.config.ranking import RANKING_MODELS as RANKING_MODELS
