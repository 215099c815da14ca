"""Content for an existing DLRM and its training loop.

Three lines of the loop change: the batches (`DLRMOfItems.batches`), the model (`add_content`) and
the loss wrapper (`DLRMWithContentTrain`). `recsys.plug_in.model` is the model; the other modules
have its settings, items and batches, and load and save checkpoints of the DLRM alone.
"""

from recsys.plug_in.build import DLRMOfItems, add_content
from recsys.plug_in.checkpoint import dlrm_state, load_dlrm
from recsys.plug_in.model import DLRMWithContent, DLRMWithContentTrain
from recsys.plug_in.settings import PlugInSettings, load_plug_in_settings

__all__ = [
    "DLRMOfItems",
    "DLRMWithContent",
    "DLRMWithContentTrain",
    "PlugInSettings",
    "add_content",
    "dlrm_state",
    "load_dlrm",
    "load_plug_in_settings",
]
