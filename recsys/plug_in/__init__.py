"""Content for an existing DLRM and its training loop, or for a user's own model.

In the examples `dlrm`, `loader` and `device` are yours: a torchrec DLRM with 30 items, its batches,
and the device of this rank. `content.yaml` names a dataset and a modality.
"""

from recsys.plug_in.batches import ItemContent
from recsys.plug_in.build import add_content, build_item_content
from recsys.plug_in.model import DLRMWithContent as DLRMWithContent
from recsys.plug_in.model import DLRMWithContentTrain as DLRMWithContentTrain
from recsys.plug_in.model import dlrm_state, load_dlrm
from recsys.plug_in.settings import ContentRates as ContentRates
from recsys.plug_in.settings import PlugInSettings as PlugInSettings
from recsys.plug_in.settings import load_plug_in_settings

__all__ = [
    "ItemContent",
    "add_content",
    "build_item_content",
    "dlrm_state",
    "load_dlrm",
    "load_plug_in_settings",
]
