"""Encoder of items in a package: settings, trained weights, and identities of the encoders.

Frozen weights, tokenizers and image processors are loaded by name, and refused if hashes differ.
Shapes: K items to encode, U items of a block, E width of content vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from embeddings import MemoryBank
from recsys.config import Config, content_settings, load_config
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import make_encoder
from recsys.content.encoders.identity import check_identities
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.items.kind import make_kinds
from recsys.model.precision import content_modules, use_bfloat16
from recsys.serving.package import Manifest
from recsys.storage.manifest import VerifiedFiles

FOLDER = "items"  # of the package
CONFIG, WEIGHTS, INDEX = "config.yaml", "weights.safetensors", "index.npy"
ITEMS_PER_CALL = 256

EntryShapes = dict[str, list[int]]


def encoded_blocks(
    branch: ContentBranch, store: ContentStore, ids: np.ndarray
) -> Iterator[Tensor]:  # [U, E] each
    """Encode the content of items as the model does for ranked ones; the bank does not change."""
    for block in torch.from_numpy(ids).split(ITEMS_PER_CALL):
        with torch.no_grad():
            vectors = branch.encode(store.gather(block.numpy()))
        yield vectors


class EncoderCache:
    """The loaded encoder of a package that takes items repeatedly, and its verified files."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}
        self._encoder: ItemEncoder | None = None
        self.verified = VerifiedFiles()

    def of_package(self, package: Path, manifest: Manifest) -> ItemEncoder:
        """Return the encoder of a package, the loaded one if its files are the same."""
        files = {
            name: file for name, file in manifest.files.items() if name.startswith(f"{FOLDER}/")
        }
        if self._encoder is None or files != self._files:
            self._encoder, self._files = ItemEncoder(package, manifest.entry_shapes), files
        return self._encoder


class ItemEncoder:
    """Encodes items as the run of a package does."""

    def __init__(self, package: Path, shapes: EntryShapes) -> None:
        self.folder, self.shapes = package / FOLDER, shapes
        self._branch: ContentBranch | None = None
        self.config: Config = load_config(self.folder / CONFIG, ["--device", "cpu"])
        content = content_settings(self.config.content)
        assert content is not None
        self.content = content

    def read(self, items: ItemTable, cache: Path) -> ContentStore:
        """Prepare the content of items; a ValueError names a bad value by file, column and row."""
        store = ContentStore(items, self.content.modalities, cache, may_be_empty=True)
        for name, kind in store.kinds.items():
            kind.entry_shape = tuple(self.shapes[name])
            store.build(name)
            shape = list(store.arrays[name].values.shape[1:])
            if shape != self.shapes[name]:
                raise ValueError(
                    f"{items.folder}: column '{kind.modality.column}' has entries of {shape} "
                    f"values, the model reads {self.shapes[name]}; write them as for training"
                )
        return store

    def encode(self, store: ContentStore, ids: np.ndarray) -> Tensor:  # [K] -> [K, E]
        """Return content vectors; a ValueError names an encoder that is not that of the run."""
        return torch.cat([*encoded_blocks(self.load(), store, ids)])

    def load(self) -> ContentBranch:
        """Load the encoders once; a ValueError names an encoder that is not that of the run."""
        if self._branch is not None:
            return self._branch
        kinds = make_kinds(self.content.modalities)
        encoders = {
            name: make_encoder(kind, tuple(self.shapes[name])) for name, kind in kinds.items()
        }
        identities = {
            name: encoder.identity for name, encoder in encoders.items() if encoder.identity
        }
        check_identities(identities, self.folder)
        mode, width = self.content.history.mode, self.content.vector_dim
        bank = None if mode == "full" else MemoryBank(1, width, "cpu")  # no history is read
        branch = ContentBranch(encoders, self.content, bank)
        if self.config.precision == "bf16":
            use_bfloat16(content_modules(branch).values(), torch.device("cpu"))
        result = branch.load_state_dict(load_file(self.folder / WEIGHTS), strict=False)
        trained = {name for name, value in branch.named_parameters() if value.requires_grad}
        assert not result.unexpected_keys and not trained & set(result.missing_keys), result
        self._branch = branch.eval()
        return self._branch
