"""Models and settings that an encoder refuses, each with the setting and the mend."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import transformers

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders import TransformerEncoder
from tests.recsys.tiny_transformers import CONFIGS, IMAGE, SIZES


def modality_of(kind: Literal["text", "image"], **settings: Any) -> ModalitySettings:
    return ModalitySettings(kind=kind, column="c", max_length=8, image_size=8, **settings)


def transformer(name: str, modality: ModalitySettings) -> TransformerEncoder:
    model = transformers.AutoModel.from_config(CONFIGS[name])
    return TransformerEncoder(model, modality, "content.modalities.it")


def test_lora_targets_that_fit_nothing_are_named_with_what_would() -> None:
    modality = modality_of("image", training="lora", lora=LoraSettings(targets=["q_proj", "query"]))
    with pytest.raises(ValueError, match=r"it\.lora\.targets: 'query' fits no .*attention\.q_proj"):
        transformer("vit", modality)


@pytest.mark.parametrize("top_layers", [0, 4])
def test_more_or_fewer_lora_layers_than_there_are_is_an_error(top_layers: int) -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(top_layers=top_layers))
    with pytest.raises(ValueError, match=f"top_layers is {top_layers}; the encoder has 3 layers"):
        transformer("bert", modality)


def test_lora_of_rank_zero_is_an_error() -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(rank=0))
    with pytest.raises(ValueError, match=r"rank 0 .* rank must be at least 1"):
        transformer("bert", modality)


def test_a_model_without_a_stack_of_layers_is_an_error() -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    with pytest.raises(ValueError, match=r"ResNetModel has no stack of .* layers"):
        TransformerEncoder(transformers.ResNetModel(config), modality_of("image"), "it")


def test_a_model_that_does_more_between_its_layers_is_refused_not_run_wrongly() -> None:
    # CLIP's text tower has a causal mask, SigLIP a last norm under CLIP's name for another.
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=30, bos_token_id=0, eos_token_id=1, **SIZES)
    )
    with pytest.raises(ValueError, match=r"CLIPTextModel cannot be run layer by layer"):
        TransformerEncoder(text, modality_of("text"), "it")
    config = transformers.SiglipVisionConfig(**SIZES, **IMAGE, vision_use_head=False)
    with pytest.raises(ValueError, match=r"SiglipVisionModel cannot be run layer by layer"):
        TransformerEncoder(transformers.SiglipVisionModel(config), modality_of("image"), "it")


@pytest.mark.parametrize(("name", "limit"), [("bert", 512), ("roberta", 10)])
def test_texts_longer_than_the_position_embeddings_are_refused(name: str, limit: int) -> None:
    modality = ModalitySettings(kind="text", column="c", max_length=limit)
    transformer(name, modality)
    modality.max_length = limit + 1
    with pytest.raises(ValueError, match=rf"max_length is {limit + 1}; .* at most {limit} tokens"):
        transformer(name, modality)


def test_images_of_another_size_are_refused() -> None:
    modality = ModalitySettings(kind="image", column="c", image_size=16)
    with pytest.raises(ValueError, match=r"image_size is 16; the encoder wants 8"):
        transformer("vit", modality)
