"""CLIP and SigLIP: each tower of one checkpoint, alone and in the space that both share."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.pretrained import PretrainedEncoder, tiny_tokenizer
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from recsys.data.items.content_store import ContentStore
from recsys.data.items.images import ImagePreparation, decode_image
from tests.datasets import write_dataset
from tests.recsys.content.encoders.tiny_transformers import (
    CONFIGS,
    content_of,
    input_size,
    kind_of,
    saved_models,
)
from tests.recsys.data.items.item_content import table_of

TOWERS = ["clip_text", "clip_image", "siglip_text", "siglip_image"]
WHERE = "content.modalities.it"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(
        {name: CONFIGS[f"{name}_text"] for name in ("clip", "siglip")}, tmp_path_factory, std=0.3
    )


def encoder_of(
    folders: dict[str, Path], name: str, training: Literal["frozen", "lora", "full"]
) -> TransformerEncoder:
    modality = ModalitySettings(
        kind=kind_of(name),
        column="content",
        encoder=str(folders[name.split("_")[0]]),
        training=training,
        pooling="projected",
        lora=LoraSettings(rank=2, targets=["q_proj", "v_proj"], top_layers=2),
        **input_size(kind_of(name)),
    )
    encoder = build_encoder("it", modality, None)
    assert isinstance(encoder, TransformerEncoder)
    return encoder.train()


def features_of(folders: dict[str, Path], name: str, item: int) -> torch.Tensor:
    """What transformers gives for one item in the shared space."""
    model: Any = transformers.AutoModel.from_pretrained(folders[name.split("_")[0]]).eval()
    content = content_of(name)
    if kind_of(name) == "text":
        ids = content.values[item][content.mask[item]]
        return model.get_text_features(input_ids=ids[None]).pooler_output
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (content.values[item].float() / 255 - mean[:, None, None]) / std[:, None, None]
    return model.get_image_features(pixel_values=pixels[None]).pooler_output


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
@pytest.mark.parametrize("name", TOWERS)
def test_projected_tokens_are_the_features_of_the_dual_encoder(
    folders: dict[str, Path], name: str, training: Literal["frozen", "lora", "full"]
) -> None:
    encoder = encoder_of(folders, name, training)
    assert encoder.caches == (training != "full")
    output = encoder.encode(content_of(name))
    assert output.values.shape[1:] == (1, 8 if name.startswith("clip") else 16)
    for item in (0, 1, 3):
        expected = features_of(folders, name, item)
        torch.testing.assert_close(output.values[item], expected, atol=1e-5, rtol=1e-4)
    assert output.mask[:, 0].tolist() == [True, True, False, True]


def test_texts_for_siglip_are_filled_up_and_padding_is_read(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", {}, num_items=8)
    modality = ModalitySettings(kind="text", column="text", encoder="random:siglip", max_length=64)
    store = ContentStore(table_of(dataset), {"text": modality}, tmp_path / "cache")
    store.build("text")
    text = store.gather(np.arange(8))["text"]
    assert text.mask.sum(dim=1).tolist() == [0, 0, *[64] * 6]
    length = int((text.values[2] != tiny_tokenizer().pad_token_id).sum())
    assert 0 < length < 64 and not text.values[2, length:].any()
    encoder = build_encoder("text", modality, None)
    tokens = encoder.encode(text)
    assert tokens.mask[:, 0].tolist() == [False, False, *[True] * 6]


PREPARATIONS: list[tuple[dict[str, Any], ImagePreparation]] = [
    (
        # openai/clip-vit-base-patch32
        {
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
        },
        ImagePreparation((0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 3),
    ),
    (
        # google/siglip-base-patch16-224
        {
            "size": {"height": 224, "width": 224},
            "resample": 3,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ImagePreparation((0.5,) * 3, (0.5,) * 3, 3, keeps_aspect=False),
    ),
    (
        # facebook/dinov2-base
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        ImagePreparation(resampling=3, share=224 / 256),
    ),
    (
        {"size": 8, "do_normalize": False, "rescale_factor": 2 / 255},
        ImagePreparation((0.0,) * 3, (0.5,) * 3, keeps_aspect=False),
    ),
]


@pytest.mark.parametrize(("settings", "expected"), PREPARATIONS)
def test_pixels_are_prepared_as_the_checkpoint_says(
    tmp_path: Path, settings: dict[str, Any], expected: ImagePreparation
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    checkpoint = PretrainedEncoder(str(tmp_path), None, WHERE)
    assert checkpoint.images == expected and not checkpoint.notes


def test_an_image_is_squeezed_or_cut_as_its_encoder_was_trained(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2] = 255  # white at the left, which the centre square does not reach
    Image.fromarray(pixels).save(tmp_path / "image.png")
    encoded = (tmp_path / "image.png").read_bytes()
    nearest = ImagePreparation(resampling=0)
    assert not decode_image(encoded, 4, "", nearest).any()
    squeezed = decode_image(encoded, 4, "", ImagePreparation(resampling=0, keeps_aspect=False))
    assert squeezed[0, 0].tolist() == [255, 0, 0, 0]
    center = ImagePreparation(resampling=0, keeps_aspect=False, share=0.5)
    assert not decode_image(encoded, 4, "", center).any()


def test_the_encoder_normalises_by_the_preparation(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATIONS[1][0]))
    modality = ModalitySettings(kind="image", column="c", encoder=str(folder), image_size=8)
    encoder = build_encoder("it", modality)
    assert isinstance(encoder, TransformerEncoder)
    content = content_of("clip_image")
    expected = encoder.model(pixel_values=content.values[:1].float() / 127.5 - 1).last_hidden_state
    one = ContentInput(content.values[:1], content.mask[:1])
    torch.testing.assert_close(encoder.encode(one).values[:, 0], expected.mean(1))
