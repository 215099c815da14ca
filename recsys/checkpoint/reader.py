"""Read checkpoints of torch.distributed.checkpoint without running code that they contain.

`.metadata` is a pickle: only classes of the format are unpickled, and only tensors are accepted.
`StoredTensor` reads ranges of rows, whatever pieces the ranks of training have written.
Shapes: R rows, D dimension.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

BLOCK_BYTES = 2**25  # of rows that are read at a time

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
        ValueError: metadata is damaged, refers to other classes, or lists more than tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, [R] or [R, D]."""

    reader: SafeFileSystemReader
    metadata: Metadata
    key: str  # name in the checkpoint

    @property
    def _tensor(self) -> TensorStorageMetadata:
        tensor = self.metadata.state_dict_metadata[self.key]
        assert isinstance(tensor, TensorStorageMetadata), self.key
        return tensor

    @property
    def size(self) -> torch.Size:
        return self._tensor.size

    @property
    def title(self) -> str:
        return f"'{self.key}'"

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows `[start, stop)`: [stop - start] or [stop - start, D].

        Raises:
            ValueError: a file is missing or damaged.
        """
        sizes = torch.Size([stop - start, *self.size[1:]])
        offsets = torch.Size([start, *(0 for _ in self.size[1:])])
        result = torch.empty(sizes, dtype=self._tensor.properties.dtype)
        range_ = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        num_read = 0
        for item in create_read_items_for_chunk_list(self.key, self._tensor, [range_]):
            piece = self._read(item)
            ranges = zip(item.dest_offsets, item.lengths, strict=True)
            result[tuple(slice(first, first + length) for first, length in ranges)] = piece
            num_read += piece.numel()
        assert num_read == result.numel(), f"{self.key}: pieces do not cover the tensor"
        return result

    def _read(self, item: ReadItem) -> Tensor:
        """Read rows of one stored piece with all its columns: [rows] or [rows, columns]."""
        place = self.metadata.storage_data[item.storage_index]
        assert not place.transform_descriptors, "checkpoints are written without compression"
        path = Path(self.reader.path, place.relative_path)
        row, row_size = item.storage_offsets[0], math.prod(item.lengths[1:])
        try:
            with path.open("rb") as file:
                header = torch.load(
                    self.reader._slice_file(file, place), map_location="meta", weights_only=True
                )
                assert header.is_contiguous() and header.shape[1:] == item.lengths[1:], place
                begin = place.offset + header.untyped_storage()._checkpoint_offset
                piece = torch.empty(item.lengths, dtype=header.dtype)
                file.seek(begin + row * row_size * header.itemsize)
                if file.readinto(piece.view(torch.uint8).numpy().data) != piece.nbytes:
                    raise EOFError("the file ends early")
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(
                f"{path}: {self.title} cannot be read ({error}); copy the checkpoint again or use "
                "another one"
            ) from error
        return piece
