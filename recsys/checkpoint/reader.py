"""Read checkpoints of torch.distributed.checkpoint without running code that they contain.

`.metadata` is a pickle: only classes of the format are unpickled, and only tensors are accepted.
`StoredTensor` reads ranges of rows, however ranks sharded them. Shapes: R rows, D dimension.
"""

import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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

from recsys.storage.files import atomic_file
from recsys.storage.output_file import check_output

BLOCK_BYTES = 2**25  # bytes of rows that are read at a time

_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
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
    """FileSystemReader for folders that are not trusted; other metadata are a ValueError."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = self.read_metadata()
        self.entries = cast(dict[str, TensorStorageMetadata], self.metadata.state_dict_metadata)

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
    """Raise a ValueError with the causes of a CheckpointException, without the ranks' stacks."""
    try:
        yield
    except CheckpointException as error:
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise ValueError("; ".join(sorted(causes))) from error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, [R] or [R, D]."""

    reader: SafeFileSystemReader
    key: str  # name in the checkpoint

    @property
    def size(self) -> torch.Size:
        return self.reader.entries[self.key].size

    @property
    def title(self) -> str:
        return f"'{self.key}'"

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows `[start, stop)`: [stop - start] or [stop - start, D]; damage is an error."""
        sizes = torch.Size([stop - start, *self.size[1:]])
        offsets = torch.Size([start, *(0 for _ in self.size[1:])])
        entry, num_read = self.reader.entries[self.key], 0
        result = torch.empty(sizes, dtype=entry.properties.dtype)
        range_ = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        for item in create_read_items_for_chunk_list(self.key, entry, [range_]):
            chunk = self._read(item)
            ranges = zip(item.dest_offsets, item.lengths, strict=True)
            result[tuple(slice(first, first + length) for first, length in ranges)] = chunk
            num_read += chunk.numel()
        assert num_read == result.numel(), f"{self.key}: pieces do not cover the tensor"
        return result

    def _read(self, item: ReadItem) -> Tensor:
        """Read rows of one stored chunk with all its columns: [rows] or [rows, columns]."""
        info = self.reader.metadata.storage_data[item.storage_index]
        assert not info.transform_descriptors, "checkpoints are written without compression"
        path = Path(self.reader.path, info.relative_path)
        row, row_size = item.storage_offsets[0], math.prod(item.lengths[1:])
        try:
            with path.open("rb") as file:
                header = torch.load(
                    self.reader._slice_file(file, info), map_location="meta", weights_only=True
                )
                assert header.is_contiguous() and header.shape[1:] == item.lengths[1:], info
                begin = info.offset + header.untyped_storage()._checkpoint_offset
                chunk = torch.empty(item.lengths, dtype=header.dtype)
                file.seek(begin + row * row_size * header.itemsize)
                if file.readinto(chunk.view(torch.uint8).numpy().data) != chunk.nbytes:
                    raise EOFError("the file ends early")
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(
                f"{path}: {self.title} cannot be read ({error}); copy the checkpoint again or use "
                "another one"
            ) from error
        return chunk


# Names in the two collections of recsys.model.em3.EM3.
_TABLE_KEY = re.compile(
    r"model\.(?:embeddings\.embeddings|embedding_bags\.embedding_bags)\.([^.]+)\.weight"
)


def export_tables(folder: Path, out: Path, tables: list[str] | None = None) -> dict[str, int]:
    """Write tables of a checkpoint to one Parquet file; return the number of rows by table.

    Columns: ``table``, ``row`` (int64, the id that looks it up) and ``vector``,
    ``fixed_size_list<float32, D>``, or ``list<float32>`` if dimensions D differ. Every row group
    belongs to one table; `tables` are all by default. What cannot be used is a ValueError.
    """
    check_output(out)
    stored = stored_tables(folder)
    names = list(dict.fromkeys(tables or sorted(stored)))
    for name in names:
        if name not in stored:
            raise ValueError(f"{folder}: no table '{name}'; the tables are {sorted(stored)}")
    selected = [stored[name] for name in names]
    dims = {table.size[1] for table in selected}
    vectors = pa.list_(pa.float32(), dims.pop() if len(dims) == 1 else -1)
    schema = pa.schema(
        {"table": pa.dictionary(pa.int32(), pa.string()), "row": pa.int64(), "vector": vectors}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Weights hardly ever repeat: a dictionary of them would only cost memory and time.
    options = {"use_dictionary": ["table"], "write_statistics": ["table", "row"]}
    with atomic_file(out) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for table in selected:
            for start, block in table.blocks():
                table_names = pa.repeat(table.name, len(block)).dictionary_encode()
                rows = pa.array(np.arange(start, start + len(block)))
                values = pa.array(block.numpy().reshape(-1))
                lists = pa.FixedSizeListArray.from_arrays(values, table.size[1]).cast(vectors)
                writer.write_table(pa.Table.from_arrays([table_names, rows, lists], schema=schema))
    return {table.name: table.size[0] for table in selected}


@dataclass(frozen=True)
class StoredTable(StoredTensor):
    """A table in a checkpoint, readable by ranges of its rows."""

    name: str

    @property
    def title(self) -> str:
        return f"table '{self.name}'"

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows `[start, stop)` as float32 [stop - start, D], as `StoredTensor.rows`."""
        return super().rows(start, stop).float()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the vectors [rows, D] of each block, in the order of rows."""
        num_rows, dim = self.size
        height = max(1, BLOCK_BYTES // (4 * dim))
        for start in range(0, num_rows, height):
            yield start, self.rows(start, min(start + height, num_rows))


def require_model_alone(folder: Path) -> None:
    """Raise a ValueError for the checkpoint of a step in place of the best model."""
    if any(name.startswith("optimizer.") for name in SafeFileSystemReader(folder).entries):
        raise ValueError(
            f"{folder}: the state of a step, not that of the best model; bring the folder back, or "
            "train again"
        )


def table_of_key(key: str) -> str | None:
    """Return the table whose weight, or a tensor beside it, has this name in a checkpoint."""
    match = _TABLE_KEY.match(key)
    return None if match is None else match[1]


def stored_tables(folder: Path) -> dict[str, StoredTable]:
    """Return the tables of a checkpoint by name."""
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder}: no checkpoint; export the run of a finished training")
    reader = SafeFileSystemReader(folder)
    matches = filter(None, map(_TABLE_KEY.fullmatch, reader.entries))
    tables = {match[1]: StoredTable(reader, match[0], match[1]) for match in matches}
    if not tables:
        raise ValueError(f"{folder}: a checkpoint without tables; name one that `train` wrote")
    return tables
