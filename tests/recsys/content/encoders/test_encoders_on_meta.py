"""Encoders on the meta device have the sizes of real ones, and no weights are read for them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import build_encoder
from tests.recsys.content.encoders.tiny_transformers import CONFIGS


def sizes(modality: ModalitySettings, device: str) -> dict[str, tuple[list[int], bool, str]]:
    """Shape, whether it trains and the device of each parameter."""
    with torch.device(device):
        encoder = build_encoder("x", modality, None)
    return {
        name: (list(parameter.shape), parameter.requires_grad, parameter.device.type)
        for name, parameter in encoder.named_parameters()
    }


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_parameters_are_those_of_a_real_encoder(kind: Any, training: Any) -> None:
    targets = ["query", "value"] if kind == "text" else ["q_proj", "v_proj"]
    modality = ModalitySettings(
        kind,
        "column",
        encoder="random:bert" if kind == "text" else "random:vit",
        training=training,
        lora=LoraSettings(rank=2, targets=targets),
        image_size=32,
    )
    real, meta = sizes(modality, "cpu"), sizes(modality, "meta")

    assert {name: size[:2] for name, size in meta.items()} == {n: s[:2] for n, s in real.items()}
    assert {device for _, _, device in meta.values()} == {"meta"}


def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    CONFIGS["bert"].save_pretrained(tmp_path)
    modality = ModalitySettings("text", "column", encoder=str(tmp_path), max_length=8)

    assert {device for _, _, device in sizes(modality, "meta").values()} == {"meta"}
    with pytest.raises(ValueError, match=str(tmp_path)):
        sizes(modality, "cpu")
