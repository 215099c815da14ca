"""Architectures beyond BERT, ViT, CLIP and SigLIP: cut below their adapters, or run whole."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from tests.recsys.content.encoders.tiny_transformers import (
    OTHER_CONFIGS,
    input_size,
    kind_of,
    saved_models,
)

MODELS = list(OTHER_CONFIGS)
LENGTHS = [6, 0, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(
        {name: config for name, (config, _, _) in OTHER_CONFIGS.items()}, tmp_path_factory, std=0.3
    )


def encoder_of(
    folders: dict[str, Path],
    name: str,
    training: Literal["frozen", "lora", "full"],
    top_layers: int = 1,
) -> TransformerEncoder:
    modality = ModalitySettings(
        kind=kind_of(name),
        column="content",
        encoder=str(folders[name]),
        training=training,
        pooling="none",
        lora=LoraSettings(rank=2, targets=OTHER_CONFIGS[name][1], top_layers=top_layers),
        **input_size(kind_of(name)),
    )
    encoder = build_encoder("it", modality, None)
    assert isinstance(encoder, TransformerEncoder)
    for key, parameter in encoder.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    return encoder.train()


def content_of(name: str) -> ContentInput:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor(LENGTHS)
    if kind_of(name) == "image":
        pixels = torch.randint(256, (3, 3, 8, 8), generator=generator).to(torch.uint8)
        return ContentInput(pixels, lengths.unsqueeze(1) > 0)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    ids = torch.randint(5, 30, (3, 6), generator=generator)
    return ContentInput(torch.where(mask, ids, 0), mask)


def hidden_states(model: Any, name: str, item: int) -> Tensor:
    """Of one item without padding, [T, D]."""
    content = content_of(name)
    if kind_of(name) == "text":
        ids = content.values[item][content.mask[item]]
        return model(input_ids=ids[None]).last_hidden_state[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (content.values[item].float() / 255 - mean[:, None, None]) / std[:, None, None]
    states = model(pixel_values=pixels[None]).last_hidden_state[0]
    return states.flatten(1).T if states.dim() == 3 else states


@pytest.mark.parametrize("training", ["frozen", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_whole_model(
    folders: dict[str, Path], name: str, training: Literal["frozen", "full"]
) -> None:
    encoder = encoder_of(folders, name, training)
    output = encoder.encode(content_of(name))
    model: Any = transformers.AutoModel.from_pretrained(folders[name]).eval()
    model = model.get_encoder() if name == "t5" else model
    for item in (0, 2):
        tokens = output.values[item][output.mask[item]]
        expected = hidden_states(model, name, item)
        assert tokens.dtype == (torch.float16 if training == "frozen" else torch.float32)
        rounding = 2**-11 if training == "frozen" else 0
        torch.testing.assert_close(tokens.float(), expected, atol=1e-4, rtol=1e-4 + rounding)
    assert not output.mask[1].any()
    if training == "full":  # no parameter waits in vain for the gradient that all ranks sum
        output.values.sum().backward()
        trained = [weight for weight in encoder.parameters() if weight.requires_grad]
        assert trained and all(weight.grad is not None for weight in trained)


@pytest.mark.parametrize("adapted_layers", ["top", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_above_a_cut_equal_adapters_in_the_whole_model(
    folders: dict[str, Path], name: str, adapted_layers: str
) -> None:
    layers = len(encoder_of(folders, name, "frozen")._layers)
    encoder = encoder_of(folders, name, "lora", 1 if adapted_layers == "top" else layers)
    assert (encoder.split is not None) == encoder.caches == OTHER_CONFIGS[name][2]
    assert bool(encoder.notes) != encoder.caches
    output = encoder.encode(content_of(name))
    for item in (0, 2):  # adapters are in `model`, which here runs whole
        tokens = output.values[item][output.mask[item]]
        expected = hidden_states(encoder.model, name, item)
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    output.values[output.mask].square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in key), key
