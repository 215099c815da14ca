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
