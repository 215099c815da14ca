"""Ranking models: ID vectors and content vectors -> logits.

`RANKING_MODELS` holds those of the package by the name that `ranking.name` gives. A class of your
own needs no entry: `ranking.name: package.module:Class` names it.
"""

from recsys.config.ranking import RANKING_MODELS as RANKING_MODELS
