"""Whether the values of a tensor can be read without waiting for a GPU."""

import torch
from torch import Tensor


class _Host:
    """The type of devices whose memory the host reads; tests of waits change it."""

    device = "cpu"


def is_on_host(tensor: Tensor) -> bool:
    """Return whether sizes and branches may depend on the values; on a GPU a step would wait."""
    return tensor.device.type == _Host.device


def is_host(device: torch.device) -> bool:
    """Return whether the values of tensors on this device can be read without waiting."""
    return device.type == _Host.device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for its copy from the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # other memory would be copied synchronously
    return tensor.to(device, non_blocking=True)
