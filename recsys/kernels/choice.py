"""Choose between the native kernels and the PyTorch reference: the setting `kernels`."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from recsys.kernels.compiler import CompileError, load_kernels
from recsys.kernels.operators import FLOATS, is_forward_mode

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "torch", "native"]


class _KernelChoice:
    kernels: Kernels = "auto"
    are_loaded: bool | None = None  # None: not tried yet


def choose_kernels(kernels: Kernels, device: str = "cpu") -> None:
    """Set the kernels of this process; models read it at each call.

    auto: native kernels where they compile; torch: PyTorch; native: kernels or an error. On CUDA
    PyTorch computes.

    Raises:
        ValueError: native kernels cannot be compiled.
    """
    _KernelChoice.kernels = kernels
    if device == "cuda" and kernels != "torch":
        logger.info("kernels is %s: on CUDA PyTorch computes, as kernels exist for CPU", kernels)
    elif kernels == "native" and not _KernelChoice.are_loaded:
        try:
            load_kernels()
        except CompileError as error:
            raise ValueError(
                f"kernels is native, but {error}; install a C++ compiler (Debian: g++; another one "
                "is named by the environment variable CXX), or set kernels to auto or torch"
            ) from error
        _KernelChoice.are_loaded = True


def has_native(*tensors: Tensor) -> bool:
    """Return whether native kernels compute these inputs: on CPU, and no float64.

    The first call loads them. PyTorch computes forward-mode derivatives and graphs of torch.export.
    """
    if _KernelChoice.kernels == "torch" or torch.compiler.is_exporting() or is_forward_mode():
        return False
    if any(part.dtype not in FLOATS for part in tensors):
        return False
    return all(part.device.type == "cpu" for part in tensors) and _are_loaded()


def rounds_products(device: torch.device) -> bool:
    """Return whether autocast asks for products of bfloat16 on this device.

    Kernels then round both factors of their matrix products and add in float32.
    """
    return (
        torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type) == torch.bfloat16
    )


@torch.compiler.assume_constant_result
def _are_loaded() -> bool:
    """Load the kernels at the first call; warn in one line if that is not possible."""
    if _KernelChoice.are_loaded is None:
        try:
            load_kernels()
            _KernelChoice.are_loaded = True
        except CompileError as error:
            logger.warning(
                "native kernels are not used, PyTorch computes in their place: %s", error
            )
            _KernelChoice.are_loaded = False
    return _KernelChoice.are_loaded
