"""FLOPs and bytes of work, and the least time they take.

Bytes are the least that must move if everything between a part's inputs and outputs stayed in the
processor: inputs, weights and outputs once, forward and backward. The floor of a part is the time
that its FLOPs or its bytes take at the rates of `recsys.diagnostics.cost.roofline`, whichever is
longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from recsys.diagnostics.cost.roofline import Anchor

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What one direction of a part does."""

    products: float = 0.0  # FLOPs of matrix products
    others: float = 0.0  # FLOPs of attention kernels, sums over histories and optimizers
    bytes: float = 0.0
    outputs: float = 0.0  # bytes of the products' results, which a backward needs

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.others + other.others,
            self.bytes + other.bytes,
            self.outputs + other.outputs,
        )

    @property
    def flops(self) -> float:
        return self.products + self.others

    def floor(self, anchor: Anchor) -> float:
        """Seconds."""
        return max(self.flops / anchor.flops_per_second, self.bytes / anchor.bytes_per_second)


@dataclass(frozen=True)
class PartCost:
    """One part of a step; `measured_as` names the part of the step trace that holds its forward."""

    name: str
    measured_as: str
    forward: Work
    backward: Work = Work()

    def floor(self, anchor: Anchor) -> float:
        """Seconds of both directions."""
        return self.forward.floor(anchor) + self.backward.floor(anchor)


def linear(rows: float, inputs: float, outputs: float) -> Work:
    """The product alone, [rows, inputs] x [inputs, outputs]; its bytes are the part's to count."""
    return Work(products=2 * rows * inputs * outputs, outputs=FLOAT * rows * outputs)


def times(work: Work, factor: float) -> Work:
    """`factor` times the work."""
    return Work(
        work.products * factor, work.others * factor, work.bytes * factor, work.outputs * factor
    )


def moved(numbers: float) -> Work:
    """So many numbers read or written."""
    return Work(bytes=FLOAT * numbers)
