"""Tiny configurations of the transformers models that encoders are tested with."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn

from recsys.data.batch import ContentInput

LENGTHS = [6, 1, 0, 4]  # tokens of each item; item 2 has no text, and no image
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}
IDS: dict[str, Any] = {"vocab_size": 30, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}
TEXT: dict[str, Any] = {**SIZES, **IDS, "max_position_embeddings": 8, "attention_dropout": 0.3}
VISION: dict[str, Any] = {**SIZES, **IMAGE, "attention_dropout": 0.3}
CLIP = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
SIGLIP = transformers.SiglipConfig(
    text_config={**TEXT, "projection_size": 16}, vision_config=VISION
)
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(vocab_size=30, **SIZES, **DROPOUT),
    "roberta": transformers.RobertaConfig(
        vocab_size=30, max_position_embeddings=12, **SIZES, **DROPOUT
    ),
    "clip_text": CLIP,
    "siglip_text": SIGLIP,
    "vit": transformers.ViTConfig(**SIZES, **IMAGE, **DROPOUT),
    "clip": transformers.CLIPVisionConfig(**VISION),
    "clip_image": CLIP,
    "siglip_image": SIGLIP,
}
# Architectures beyond those above: whether each can be cut below its adapters.
OTHER_CONFIGS: dict[str, tuple[Any, list[str], bool]] = {
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=30, dim=16, n_layers=3, n_heads=2, hidden_dim=24, dropout=0.3
        ),
        ["q_lin", "v_lin"],
        True,
    ),
    "mpnet": (transformers.MPNetConfig(vocab_size=30, **SIZES), ["q", "v"], True),
    "electra": (
        transformers.ElectraConfig(vocab_size=30, embedding_size=8, **SIZES),
        ["query", "value"],
        True,
    ),
    "deberta": (
        transformers.DebertaV2Config(
            vocab_size=30,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            max_relative_positions=8,
            **SIZES,
        ),
        ["query_proj", "value_proj"],
        True,
    ),
    "modernbert": (
        transformers.ModernBertConfig(
            **SIZES, **IDS, cls_token_id=3, sep_token_id=4, attention_dropout=0.3
        ),
        ["Wqkv"],
        True,
    ),
    "qwen3": (
        transformers.Qwen3Config(**SIZES, **IDS, num_key_value_heads=1, head_dim=8),
        ["q_proj", "v_proj"],
        True,
    ),
    "t5": (
        transformers.T5Config(
            vocab_size=30, d_model=16, d_kv=8, num_layers=3, num_heads=2, d_ff=24, dropout_rate=0.3
        ),
        ["q", "v"],
        False,  # the first layer makes the position bias of all
    ),
    "albert": (
        transformers.AlbertConfig(vocab_size=30, embedding_size=8, **SIZES),
        ["query", "value"],
        True,  # of three equal layers that are one
    ),
    "dinov2": (
        transformers.Dinov2Config(**SIZES, **IMAGE, drop_path_rate=0.3),
        ["q_proj", "v_proj"],
        True,
    ),
    "swin": (
        transformers.SwinConfig(
            image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        ),
        ["q_proj", "v_proj"],
        False,  # its stages have other widths
    ),
    "convnext": (
        transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=8
        ),
        ["pwconv1"],
        False,
    ),
}
OTHER_TEXT = ["distilbert", "mpnet", "electra", "deberta", "modernbert", "qwen3", "t5", "albert"]


def kind_of(name: str) -> Literal["text", "image"]:
    """What a model of `CONFIGS` or `OTHER_CONFIGS` reads."""
    texts = ["bert", "roberta", "clip_text", "siglip_text", *OTHER_TEXT]
    return "text" if name in texts else "image"


def input_size(kind: str) -> dict[str, Any]:
    """Return the setting by which content of a kind fits the models of `CONFIGS`."""
    return {"max_length": 8} if kind == "text" else {"image_size": 8}


def tower_of(name: str, model: Any) -> Any:
    """The part of a model that is tested; of a dual encoder one of its two."""
    if name.endswith("_text"):
        return model.text_model
    return model.vision_model if name.endswith("_image") else model


def content_of(name: str, padded_length: int = 6) -> ContentInput:
    """Four items that a model of `CONFIGS` reads; texts have `padded_length` places for tokens."""
    generator = torch.Generator().manual_seed(2)
    if kind_of(name) == "image":
        pixels = torch.randint(256, (len(LENGTHS), 3, 8, 8), generator=generator)
        mask = torch.tensor(LENGTHS).unsqueeze(1) > 0
        return ContentInput(pixels.to(torch.uint8), mask)
    lengths = torch.tensor(LENGTHS)
    if name == "siglip_text":  # texts are filled up
        lengths, padded_length = 8 * (lengths > 0), 8
    ids = torch.randint(5, 30, (len(LENGTHS), 9), generator=generator)[:, :padded_length]
    mask = torch.arange(padded_length)[None, :] < lengths[:, None]
    if name == "clip_text":  # its sign for the end of a text
        ids.scatter_(1, (lengths - 1).clamp(min=0)[:, None], 4)
    return ContentInput(torch.where(mask, ids, 0), mask)


def saved_models(
    configs: dict[str, Any], factory: pytest.TempPathFactory, std: float
) -> dict[str, Path]:
    """Folders of models with normal weights: as initialised, biases are 0 and norms 1."""
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
        folders[name] = factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders
