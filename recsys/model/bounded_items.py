"""Settings that a bounded vocabulary of the ranked items excludes."""

from __future__ import annotations

from recsys.config import Config, content_settings, softmax_settings
from recsys.data.schema import Schema
from recsys.ranking.settings import SimSettings


def check_bounded_items(config: Config, schema: Schema) -> None:
    """Check a configuration for data whose items get their rows while training.

    Raises:
        ValueError: a setting needs items that have rows before; names it with the fix.
    """
    if not schema.has_bounded_items:
        return
    content, softmax = content_settings(config), softmax_settings(config.ranking)
    where = f"'{schema.target_item}' has a vocabulary of kind bounded"
    if content is not None and content.sampling.backward < 1:
        raise ValueError(
            f"content.sampling.backward is {content.sampling.backward}, but {where}: items without "
            "a row have no vector in the memory bank; set it to 1, or choose kind exact"
        )
    if content is not None and content.sampling.encoders < 1:
        raise ValueError(
            f"content.sampling.encoders is {content.sampling.encoders}, but {where}: no output is "
            "kept of items without a row; set it to 1, or choose kind exact"
        )
    if softmax is not None and softmax.loss == "sampled_softmax":
        raise ValueError(
            f"ranking.loss is sampled_softmax, but {where}, whose rows it cannot sample by their "
            "frequency; set in_batch_softmax, or choose kind exact"
        )
    if isinstance(config.ranking, SimSettings) and config.ranking.search == "category":
        raise ValueError(
            f"ranking.search is category, but {where}, and categories are kept by row; set another "
            "search, or choose kind exact"
        )
