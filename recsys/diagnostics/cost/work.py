"""Adds up FLOPs and bytes of work, and computes the least time that they take.

Bytes are the least that must move if all intermediate results of a part stayed in the processor:
inputs, weights and outputs once, forward and backward. The roofline of a part is the
time that its FLOPs or its bytes take at the rates of `recsys.diagnostics.cost.roofline`, whichever
is longer.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from recsys.diagnostics.cost.roofline import Anchor

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one direction of a part."""

    products: float = 0.0  # FLOPs of matrix products
    others: float = 0.0  # FLOPs of batched products (attention), convolutions and optimizers
    bytes: float = 0.0
    outputs: float = 0.0  # bytes of the products' results, kept for the backward

    def __add__(self, other: Work) -> Work:
        """Return the sum of both, field by field."""
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other))))

    @property
    def flops(self) -> float:
        """Return the FLOPs of products and others."""
        return self.products + self.others

    def roofline(self, anchor: Anchor) -> float:
        """Return the least seconds at the rates of `anchor`."""
        return max(self.flops / anchor.flops_per_second, self.bytes / anchor.bytes_per_second)


@dataclass(frozen=True)
class PartCost:
    """One part of a step; `measured_as` names the part of the step trace that holds its forward."""

    name: str
    measured_as: str
    forward: Work
    backward: Work = Work()

    def roofline(self, anchor: Anchor) -> float:
        """Return the least seconds of both directions."""
        return self.forward.roofline(anchor) + self.backward.roofline(anchor)

    def scaled(self, factor: float) -> PartCost:
        """Return the cost of `factor` times the part."""
        forward, backward = times(self.forward, factor), times(self.backward, factor)
        return replace(self, forward=forward, backward=backward)


def linear(rows: float, inputs: float, outputs: float) -> Work:
    """Return the work of a product [rows, inputs] x [inputs, outputs], without its bytes."""
    return Work(products=2 * rows * inputs * outputs, outputs=FLOAT * rows * outputs)


def times(work: Work, factor: float) -> Work:
    """Return `factor` times the work."""
    return Work(*(value * factor for value in astuple(work)))


def moved(numbers: float) -> Work:
    """Return the work of reading or writing a number of float32 values."""
    return Work(bytes=FLOAT * numbers)
