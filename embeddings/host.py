"""Whether the values of a tensor can be read without waiting for a GPU."""

import torch
from torch import Tensor


class _Host:
    """The device type whose values the host reads without waiting; tests replace it."""

    device = "cpu"


def is_on_host(tensor: Tensor) -> bool:
    """Return whether Python may read the tensor's values; on a GPU that would block the step."""
    return tensor.device.type == _Host.device


def is_host(device: torch.device) -> bool:
    """Return whether the values of tensors on this device can be read without waiting."""
    return device.type == _Host.device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device asynchronously and return the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from unpinned memory are synchronous
    return tensor.to(device, non_blocking=True)
