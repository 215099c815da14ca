"""Tiny encoders with random weights, `random:bert` and `random:vit`, for tests and dry runs.

They run the very code paths of pretrained ones in milliseconds and need no files. Their weights
come from a fixed seed, since frozen weights are not stored in checkpoints.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return {word: index for index, word in enumerate(words)}


def tiny_tokenizer() -> Any:
    """WordPiece over single characters."""
    return BertTokenizer(vocab=_vocabulary(), do_lower_case=True)


def tiny_model(name: str, where: str) -> nn.Module:
    """`random:bert` or `random:vit`.

    Raises:
        ValueError: any other name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "random:bert":
            config = BertConfig(vocab_size=len(_vocabulary()), **SIZES)
            return BertModel(config, add_pooling_layer=False)
        if name == "random:vit":
            return ViTModel(
                ViTConfig(image_size=32, patch_size=16, **SIZES), add_pooling_layer=False
            )
    raise ValueError(f"{where}: encoder '{name}' is unknown; choose random:bert or random:vit")
