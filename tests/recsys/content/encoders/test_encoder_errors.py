"""Models and settings that an encoder refuses, each with the setting and the fix."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import transformers

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.image_transformer import ImageTransformer
from recsys.content.encoders.text_transformer import TextTransformer
from recsys.content.encoders.transformer import TransformerEncoder
from tests.recsys.content.encoders.tiny_transformers import CONFIGS


def modality_of(kind: Literal["text", "image"], **settings: Any) -> ModalitySettings:
    return ModalitySettings(kind=kind, column="c", max_length=8, image_size=8, **settings)


def transformer(name: str, modality: ModalitySettings) -> TransformerEncoder:
    model = transformers.AutoModel.from_config(CONFIGS[name])
    kind = TextTransformer if modality.kind == "text" else ImageTransformer
    return kind(model, modality, "content.modalities.it")


def test_lora_targets_that_fit_nothing_are_named_with_what_would() -> None:
    modality = modality_of("image", training="lora", lora=LoraSettings(targets=["q_proj", "query"]))
    with pytest.raises(ValueError, match=r"it\.lora\.targets: 'query' .*attention\.q_proj"):
        transformer("vit", modality)


@pytest.mark.parametrize("top_layers", [0, 4])
def test_more_or_fewer_lora_layers_than_there_are_is_an_error(top_layers: int) -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(top_layers=top_layers))
    with pytest.raises(ValueError, match=f"top_layers is {top_layers}; .*3 layers"):
        transformer("bert", modality)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 3]}, r"lora\.layers is \[1, 3\]; .*0 to 2"),
        ({"rank": 3, "init_lora_weights": "orthogonal"}, r"peft refuses .*even"),
        ({"init_lora_weights": "loftq"}, r"peft refuses .*loftq_config"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(**settings))
    with pytest.raises(ValueError, match=message):
        transformer("bert", modality)


def test_lora_of_rank_zero_is_an_error() -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(rank=0))
    with pytest.raises(ValueError, match=r"it.lora: rank 0 .* 1"):
        transformer("bert", modality)


def test_a_model_that_reads_something_else_is_an_error() -> None:
    modality = modality_of("text")
    with pytest.raises(ValueError, match=r"it\.encoder: ViTModel .*texts"):
        transformer("vit", modality)


def test_a_model_without_an_own_pooled_output_cannot_be_projected() -> None:
    with pytest.raises(ValueError, match=r"pooled output .* projected"):
        TextTransformer(
            transformers.BertModel(CONFIGS["bert"], add_pooling_layer=False),
            modality_of("text", pooling="projected"),
            "it",
        )


def test_texts_of_siglip_are_as_long_as_it_was_trained_on() -> None:
    tower = transformers.AutoModel.from_config(CONFIGS["siglip_text"]).text_model
    TextTransformer(tower, modality_of("text"), "it")
    modality = ModalitySettings(kind="text", column="c", max_length=7)
    with pytest.raises(ValueError, match=r"max_length is 7; .* 8"):
        TextTransformer(tower, modality, "it")


@pytest.mark.parametrize(("name", "limit"), [("bert", 512), ("roberta", 10)])
def test_texts_longer_than_the_position_embeddings_are_refused(name: str, limit: int) -> None:
    modality = ModalitySettings(kind="text", column="c", max_length=limit)
    transformer(name, modality)
    modality.max_length = limit + 1
    with pytest.raises(ValueError, match=rf"max_length is {limit + 1}; .* {limit} "):
        transformer(name, modality)


def test_images_of_another_size_are_refused() -> None:
    modality = ModalitySettings(kind="image", column="c", image_size=16)
    with pytest.raises(ValueError, match=r"image_size is 16; .* 8"):
        transformer("vit", modality)
