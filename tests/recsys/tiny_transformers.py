"""Tiny configurations of the transformers models that encoders are tested with."""

from typing import Any

import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(vocab_size=30, **SIZES, **DROPOUT),
    "roberta": transformers.RobertaConfig(
        vocab_size=30, max_position_embeddings=12, **SIZES, **DROPOUT
    ),
    "vit": transformers.ViTConfig(**SIZES, **IMAGE, **DROPOUT),
    "clip": transformers.CLIPVisionConfig(**SIZES, **IMAGE, attention_dropout=0.3),
}
