"""Writes the encoder of items of a run into a package, where `ItemEncoder` reads it.

It needs the run with its checkpoint and tables, whose libraries take seconds to import; adding
items does without.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from recsys.build import Job
from recsys.checkpoint.run_folder import encoder_identities
from recsys.checkpoint.state import model_state
from recsys.config import save_config
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.identity import write_identities
from recsys.serving.new_items.added_items import content_index
from recsys.serving.new_items.item_encoder import CONFIG, FOLDER, INDEX, WEIGHTS, EntryShapes

PREFIX = "model.content."  # of the branch's weights in the state of a model


def write_item_encoder(package: Path, job: Job) -> EntryShapes:
    """Write what `ItemEncoder` reads, and the index of the items that the package has.

    Returns:
        by modality, the shape of an item's entries; empty without content.
    """
    if job.em3.content is None or job.store is None:
        return {}
    folder = package / FOLDER
    folder.mkdir()
    save_config(job.config, folder / CONFIG)
    write_identities(encoder_identities(job), folder)
    weights = {
        name.removeprefix(PREFIX): cast(Tensor, value).detach().clone()
        for name, value in model_state(job).items()
        if name.startswith(PREFIX)
    }
    save_file(weights, folder / WEIGHTS)
    np.save(folder / INDEX, content_index(job.store))
    shapes = {}
    for name, encoder in job.em3.content.encoders.items():
        # A cache holds the outputs of frozen layers in place of the entries.
        is_cached = cast(Encoder, encoder).is_cached
        of_entries = job.store.arrays[name].values.shape[1:]
        shapes[name] = list(job.store.kinds[name].entry_shape if is_cached else of_entries)
    return shapes
