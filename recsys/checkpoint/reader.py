"""Read checkpoints of torch.distributed.checkpoint without running code that they contain.

torch reads tensors with `weights_only`, but `.metadata` is a pickle, and entries that are not
tensors would be unpickled without restriction. This reader unpickles only classes of the format in
the metadata, and refuses entries that are not tensors, which our checkpoints do not have.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}


class _FormatUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes of the checkpoint format."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _ALLOWED.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class SafeFileSystemReader(FileSystemReader):
    """FileSystemReader for folders that are not trusted.

    Raises:
        ValueError: the metadata is missing or damaged, refers to anything but the format's own
            classes, or lists entries that are not tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata` through the restricted unpickler."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _FormatUnpickler(file).load()
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file; this is no whole checkpoint") from error
        except Exception as error:  # damaged pickles raise exceptions of any class
            raise ValueError(f"{path}: not the metadata of a checkpoint ({error})") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path}: not the metadata of a checkpoint")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{path}: entry '{name}' is no tensor and is not read")
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def readable_failure() -> Iterator[None]:
    """Reduce a CheckpointException to its causes, without the stacks of all ranks."""
    try:
        yield
    except CheckpointException as error:
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise ValueError("; ".join(sorted(causes))) from error
