"""Fusion: the tokens of all modalities -> one content vector per item.

`FusionQFormer` is EM3's Fusion-Q-Former (arXiv 2404.06078, section 3). Preset `published` equals
the authors' public code; preset `modern` starts as `ConcatFusion`, the baseline.
"""

from __future__ import annotations

from torch import nn

from recsys.config import FusionSettings
from recsys.config.named_parts import make_part
from recsys.content.fusion.qformer import ConcatFusion as ConcatFusion
from recsys.content.fusion.qformer import FusionQFormer as FusionQFormer
from recsys.content.fusion.qformer import JointSelfAttention as JointSelfAttention

FUSIONS = {
    "qformer": "recsys.content.fusion:FusionQFormer",
    "concat": "recsys.content.fusion:ConcatFusion",
}


def build_fusion(settings: FusionSettings, dim: int, num_modalities: int) -> nn.Module:
    """Return the fusion that a configuration names, constructed as Class(dim, num_modalities, ...).

    A user's class, `package.module:Class`, gets `content.fusion.options` by name. Its
    `forward(tokens, mask, modality)` has the arguments of `ConcatFusion`.
    """
    options = settings.options
    if settings.name == "qformer":
        names = ("num_queries", "num_layers", "num_heads", "dropout", "preset")
        options = {name: getattr(settings, name) for name in names}
    where = "content.fusion.name"
    return make_part(where, settings.name, FUSIONS, nn.Module, dim, num_modalities, **options)
