"""EM3: a multimodal content model and a ranking model trained end to end on TorchRec.

Shapes in docstrings: B batch, L history length, N history items of a batch, D dimension,
F features, Q queries, T tokens, U unique items.

The public names load on first use, so that `recsys doctor` works where torch does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.content.branch import ContentBranch
    from recsys.content.fusion import FusionQFormer
    from recsys.data.batch import Batch
    from recsys.model.em3 import EM3
    from recsys.model.losses import ContentIDContrastive

__version__ = "0.1.0"
_MODULES = {
    "Batch": "recsys.data.batch",
    "ContentBranch": "recsys.content.branch",
    "ContentIDContrastive": "recsys.model.losses",
    "EM3": "recsys.model.em3",
    "FusionQFormer": "recsys.content.fusion",
}

__all__ = ["EM3", "Batch", "ContentBranch", "ContentIDContrastive", "FusionQFormer"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'recsys' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
