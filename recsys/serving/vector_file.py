"""Files of vectors that are mapped into memory, whole or quantised by FBGEMM row by row.

Shapes: R rows of a file, N looked up, D dimension.
"""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from torch import Tensor

StoredType = Literal["fp32", "fp16", "int8", "int4"]


@dataclass(frozen=True)
class VectorFileShape:
    """Layout of a file: R rows of D numbers in a stored type; ValueError for int4 with an odd D."""

    num_rows: int
    dim: int
    stored_as: StoredType

    def __post_init__(self) -> None:
        if self.stored_as not in get_args(StoredType):
            raise ValueError(f"type '{self.stored_as}' is none of {get_args(StoredType)}")
        if self.stored_as == "int4" and self.dim % 2:
            raise ValueError(
                f"int4 packs two numbers into a byte, but vectors have {self.dim}; use int8, or an "
                "even embedding.dim"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: int8 has a scale and an offset in fp32, int4 in fp16."""
        sizes = {"fp32": 4 * self.dim, "fp16": 2 * self.dim, "int8": self.dim + 8}
        return sizes.get(self.stored_as, self.dim // 2 + 4)

    def packed(self, vectors: Tensor) -> Tensor:  # float32 [N, D] -> uint8 [N, row_bytes]
        vectors = vectors.float().contiguous()
        if self.stored_as == "int8":
            return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(vectors)
        if self.stored_as == "int4":
            return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(vectors, 4)
        return (vectors.half() if self.stored_as == "fp16" else vectors).view(torch.uint8)

    def unpacked(self, rows: Tensor) -> Tensor:  # uint8 [N, row_bytes] -> float32 [N, D]
        if not rows.shape[0]:
            return torch.zeros(0, self.dim)
        if self.stored_as == "int8":
            return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)
        if self.stored_as == "int4":
            return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, 4)
        return rows.view(torch.float16 if self.stored_as == "fp16" else torch.float32).float()


def write_vectors(path: Path, shape: VectorFileShape, blocks: Iterable[Tensor]) -> None:
    """Write blocks of vectors [rows, D] in their order, R rows in all."""
    num_rows = 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(shape.packed(block).numpy().data)
            num_rows += block.shape[0]
    assert num_rows == shape.num_rows, (path, num_rows, shape)


class VectorFile:
    """A file of vectors, mapped into memory and read by row; the package checks its size."""

    def __init__(self, path: Path, shape: VectorFileShape) -> None:
        self.shape = shape
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # else reading a row also reads 32 pages ahead
        size = (shape.num_rows, shape.row_bytes)
        self._rows = np.frombuffer(mapped, np.uint8, shape.num_rows * shape.row_bytes).reshape(size)

    def rows(self, ids: np.ndarray) -> Tensor:  # int64 [N] -> [N, D]
        """Return vectors; ids beyond the file get its last row."""
        indices = np.minimum(ids, self.shape.num_rows - 1)
        return self.shape.unpacked(torch.from_numpy(self._rows[indices]))
