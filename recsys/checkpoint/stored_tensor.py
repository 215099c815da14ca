"""Tensors in a checkpoint, readable by ranges of their rows, whatever ranks wrote them.

A checkpoint holds a table in pieces, cut by rows or columns as on the ranks that trained it.
torch.load would read whole pieces, and on one rank a piece is the table. So only the header of a
piece is loaded, which gives the offset of its numbers in the file; then a range of rows is read.

Shapes: R rows, D dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from recsys.checkpoint.reader import SafeFileSystemReader


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, [R] or [R, D].

    Example::

        reader = SafeFileSystemReader(run / "checkpoints" / "best")
        StoredTensor(reader, reader.read_metadata(), "bank").rows(100, 200)  # [100, D]
    """

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
        """Size of the whole tensor."""
        return self._tensor.size

    @property
    def title(self) -> str:
        """Words for the tensor in messages."""
        return f"'{self.key}'"

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows `[start, stop)`: [stop - start] or [stop - start, D].

        Raises:
            ValueError: a file of the checkpoint is missing, cut short, or not a checkpoint file.
        """
        sizes = torch.Size([stop - start, *self.size[1:]])
        offsets = torch.Size([start, *(0 for _ in self.size[1:])])
        result = torch.empty(sizes, dtype=self._tensor.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        num_read = 0
        for item in create_read_items_for_chunk_list(self.key, self._tensor, [wanted]):
            piece = self._read(item)
            at = zip(item.dest_offsets, item.lengths, strict=True)
            result[tuple(slice(first, first + length) for first, length in at)] = piece
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
