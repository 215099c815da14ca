"""Tiny encoders with random weights of a fixed seed, `random:bert` and the like, for tests."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 16}
NAMES = ("random:bert", "random:vit", "random:clip", "random:siglip")


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return {word: index for index, word in enumerate(words)}


def tiny_tokenizer() -> Any:
    """Return a WordPiece tokenizer over single characters."""
    return BertTokenizer(vocab=_vocabulary(), do_lower_case=True)


def tiny_model(name: str, where: str) -> nn.Module:
    """Return one of the models `NAMES`; clip and siglip are dual encoders."""
    if name not in NAMES:
        raise ValueError(f"{where}: encoder '{name}' is unknown; choose {', '.join(NAMES)}")
    vocabulary = _vocabulary()
    text: dict[str, Any] = {
        **SIZES,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary["[CLS]"],
        "eos_token_id": vocabulary["[SEP]"],
        "pad_token_id": vocabulary["[PAD]"],
    }
    vision = {**SIZES, **IMAGE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "random:bert":
            config = BertConfig(vocab_size=len(vocabulary), **SIZES)
            return BertModel(config, add_pooling_layer=False)
        if name == "random:vit":
            return ViTModel(ViTConfig(**vision), add_pooling_layer=False)
        if name == "random:clip":
            return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        text["projection_size"] = SIZES["hidden_size"]
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
