"""One tower of a dual encoder: CLIP, SigLIP and models like them hold one for text, one for images.

A checkpoint of both serves two modalities: kind `text` takes the text tower, kind `image` the
vision tower. With pooling `projected` both give vectors of one space, in which an image lies near
the texts that describe it: CLIP maps each tower's pooled output there (arXiv 2103.00020), SigLIP's
pooled outputs lie there (arXiv 2303.15343).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

TOWERS = {"text": "text_model", "image": "vision_model"}
PROJECTIONS = {"text": "text_projection", "image": "visual_projection"}


def take_tower(model: Any, kind: Literal["text", "image"]) -> tuple[nn.Module, nn.Module | None]:
    """The tower for `kind` and the map from its pooled output into the space both share.

    A model without towers is given back as it is, and a tower without such a map has None.
    """
    tower = getattr(model, TOWERS[kind], None)
    if not isinstance(tower, nn.Module):
        return model, None
    projection = getattr(model, PROJECTIONS[kind], None)
    return tower, projection if isinstance(projection, nn.Module) else None
