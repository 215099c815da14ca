"""EM3: a multimodal content model and a ranking model trained end to end on TorchRec.

Shapes in docstrings: B batch, L history length, N history items of a batch, D dimension,
F features, Q queries, T tokens, U unique items.

The public names load on first use, so that `recsys doctor` works where torch does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.batch import Batch
    from recsys.content.branch import ContentBranch
    from recsys.content.fusion import FusionQFormer
    from recsys.losses import ContentIDContrastive
    from recsys.model import EM3

_HOMES = {
    "Batch": "recsys.batch",
    "ContentBranch": "recsys.content.branch",
    "ContentIDContrastive": "recsys.losses",
    "EM3": "recsys.model",
    "FusionQFormer": "recsys.content.fusion",
}

__all__ = ["EM3", "Batch", "ContentBranch", "ContentIDContrastive", "FusionQFormer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recsys' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
