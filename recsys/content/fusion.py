"""Fusion: the tokens of all modalities -> one content vector per item.

`FusionQFormer` is EM3's Fusion-Q-Former (arXiv 2404.06078, section 3). Preset `published` equals
the authors' public code; preset `modern` starts as `ConcatFusion`, the baseline.
Shapes: U unique items, T tokens of all modalities (in layers with the queries), Q queries or
tokens with outputs, D dimension, H heads, M modalities.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.host import is_on_host
from recsys.config import FusionSettings
from recsys.config.named_parts import make_part
from recsys.content.dropout import Dropout
from recsys.kernels import has_native, log_refusal, native_fusion

FUSIONS = {
    "qformer": "recsys.content.fusion:FusionQFormer",
    "concat": "recsys.content.fusion:ConcatFusion",
}

FEW_TOKENS = 8


class JointSelfAttention(nn.Module):
    """Multi-head self-attention with the published scale sqrt(d_head + 1e-5)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads + 1e-5) ** -0.5
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, num_outputs: int) -> Tensor:  # [U, num_outputs, D]
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # once, not for each of the maps
        query, key, value = self.query(x[:, :num_outputs]), self.key(x), self.value(x)
        query, key, value = (tensor.unflatten(-1, heads) for tensor in (query, key, value))
        if is_on_host(x) and x.shape[1] <= FEW_TOKENS:
            attended = _small_attention(query, key, value, mask, self.scale)
        else:
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask[:, None, None, :], scale=self.scale
            ).transpose(1, 2)
        output: Tensor = self.output(attended.flatten(-2))
        return output


def _small_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:  # [U, Q, H, D / H], twice [U, T, H, D / H], [U, T] -> [U, Q, H, D / H]
    scores = (query.unsqueeze(2) * key.unsqueeze(1)).sum(-1) * scale  # [U, Q, T, H]
    weights = scores.masked_fill(~mask[:, None, :, None], -torch.inf).softmax(dim=2)
    return (weights.unsqueeze(-1) * value.unsqueeze(1)).sum(dim=2)


class PublishedLayer(nn.Module):
    """Joint self-attention, output dropout, then post-LayerNorm of the residual sum; no FFN."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = JointSelfAttention(dim, num_heads)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, mask: Tensor, num_outputs: int) -> Tensor:  # [U, num_outputs, D]
        attended = self.attention(x, mask, num_outputs)
        normed: Tensor = self.norm(x[:, :num_outputs] + self.dropout(attended))
        return normed


class ModernLayer(nn.Module):
    """Pre-norm joint self-attention and a GELU feed-forward of four times the width."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = JointSelfAttention(dim, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, num_outputs: int) -> Tensor:  # [U, num_outputs, D]
        attended = self.attention(self.attention_norm(x), mask, num_outputs)
        x = x[:, :num_outputs] + self.dropout(attended)
        update: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + update

    def weights(self) -> list[Tensor]:
        attention, up, down = self.attention, self.feed_forward[0], self.feed_forward[2]
        modules: list[Any] = [self.attention_norm, attention.query, attention.key, attention.value]
        modules += [attention.output, self.feed_forward_norm, up, down]
        return [weight for module in modules for weight in (module.weight, module.bias)]


class ConcatFusion(nn.Module):
    """Baseline: the mean tokens of all modalities, concatenated, through one linear map.

    A trained vector replaces a modality that an item lacks.
    """

    def __init__(self, dim: int, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.missing = nn.Parameter(torch.zeros(num_modalities, dim))
        self.output = nn.Linear(num_modalities * dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor, modality: Tensor) -> Tensor:  # [U, D]
        modalities = torch.arange(self.num_modalities, device=modality.device)
        member = (modalities.unsqueeze(1) == modality).to(tokens.dtype)  # [M, T]
        weights = member * mask.to(tokens.dtype).unsqueeze(1)  # [U, M, T]
        count = weights.sum(-1, keepdim=True)  # [U, M, 1]
        mean = weights @ tokens / count.clamp(min=1)  # [U, M, D]
        output: Tensor = self.output(torch.where(count > 0, mean, self.missing).flatten(1))
        return output


class FusionQFormer(nn.Module):
    """Trainable queries attend, jointly with the tokens, to all tokens of an item.

    Missing tokens are masked as keys. `modern` adds to each token an embedding of its modality, and
    to the projected outputs a `ConcatFusion`. Its projection starts at zero, as residual branches
    do (Fixup, arXiv 1901.09321; ReZero, arXiv 2003.04887). Heads that do not divide `dim`, or
    numbers below 1, are a ValueError.

    Example::

        import torch
        from recsys import FusionQFormer

        fusion = FusionQFormer(dim=8, num_modalities=2, num_heads=2)
        tokens = torch.randn(3, 2, 8)  # [U, T, D]
        mask = torch.tensor([[True, True], [True, False], [False, False]])
        fusion(tokens, mask, torch.tensor([0, 1])).shape  # [3, 8]
    """

    kernel = "fusion"

    def __init__(
        self,
        dim: int,
        num_modalities: int,
        num_queries: int = 2,
        num_layers: int = 1,
        num_heads: int = 4,
        dropout: float = 0.1,
        preset: Literal["published", "modern"] = "modern",
    ) -> None:
        super().__init__()
        if min(num_queries, num_layers, num_heads) < 1 or dim % num_heads:
            raise ValueError(
                f"FusionQFormer: num_queries {num_queries}, num_layers {num_layers} and num_heads "
                f"{num_heads} must be at least 1, and num_heads must divide dim {dim}"
            )
        layer: type[nn.Module] = PublishedLayer if preset == "published" else ModernLayer
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.xavier_uniform_(self.queries)
        self.layers = nn.ModuleList(layer(dim, num_heads, dropout) for _ in range(num_layers))
        self.output = nn.Linear(num_queries * dim, dim)
        self.norm: nn.Module = nn.Identity()
        self.modality_embedding: nn.Embedding | None = None
        self.linear: ConcatFusion | None = None
        if preset == "modern":
            self.norm = nn.LayerNorm(dim)
            self.modality_embedding = nn.Embedding(num_modalities, dim)
            nn.init.normal_(self.modality_embedding.weight, std=0.02)
            self.linear = ConcatFusion(dim, num_modalities)
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(
        self,
        tokens: Tensor,  # [U, T, D]
        mask: Tensor,  # [U, T], False for padding
        modality: Tensor,  # [T], index of each token's modality
    ) -> Tensor:  # [U, D]
        num_items, num_queries = tokens.shape[0], self.queries.shape[0]
        if self._has_kernel(tokens):
            return self._by_kernel(tokens, mask, modality)
        x = tokens
        if self.modality_embedding is not None:
            x = x + self.modality_embedding(modality)
        x = torch.cat([self.queries.expand(num_items, -1, -1), x], dim=1)  # [U, Q + T, D]
        attended = F.pad(mask, (num_queries, 0), value=True)  # queries are never masked
        for index, layer in enumerate(self.layers, 1):
            # Only the queries' outputs of the last layer are used.
            is_last = index == len(self.layers)
            x = layer(x, attended, num_queries if is_last else x.shape[1])
        fused: Tensor = self.output(self.norm(x).flatten(1))
        return fused if self.linear is None else fused + self.linear(tokens, mask, modality)

    def kernel_refusal(self) -> str | None:
        """Return None: the kernel limits the tokens of an item, which `forward` checks and logs."""
        return None

    def _has_kernel(self, tokens: Tensor) -> bool:  # [U, T, D]
        if self.linear is None or not has_native(tokens, self.queries):
            return False
        num_tokens = tokens.shape[1] + self.queries.shape[0]
        if num_tokens > FEW_TOKENS and not torch.compiler.is_compiling():
            size = f"an item has {num_tokens} tokens with its queries"
            log_refusal("fusion", f"{size}; the kernel takes {FEW_TOKENS}")
        return num_tokens <= FEW_TOKENS

    def _by_kernel(self, tokens: Tensor, mask: Tensor, modality: Tensor) -> Tensor:  # [U, D]
        layer = self.layers[0]
        assert isinstance(layer, ModernLayer)
        dropout, num_layers = layer.dropout.p if self.training else 0.0, len(self.layers)
        num_queries, num_tokens = self.queries.shape[0], tokens.shape[1]
        # Two dropouts in each layer; the last one has outputs for the queries alone.
        rows = (num_layers - 1) * (num_queries + num_tokens) + num_queries
        noise = torch.rand(2 * rows * tokens[:, 0].numel()) if dropout else torch.empty(0)
        weights, heads, scale = self.weights(), layer.attention.num_heads, layer.attention.scale
        return native_fusion(
            tokens, mask, modality, noise, weights, num_layers, heads, scale, dropout
        )

    def weights(self) -> list[Tensor]:
        """Return the weights of preset `modern`, in the order in which they are applied."""
        embedding, linear, norm = self.modality_embedding, self.linear, self.norm
        assert embedding is not None and linear is not None and isinstance(norm, nn.LayerNorm)
        weights = [self.queries, embedding.weight]
        for layer in self.layers:
            assert isinstance(layer, ModernLayer)
            weights += layer.weights()
        weights += [norm.weight, norm.bias, self.output.weight, self.output.bias]
        return [*weights, linear.missing, linear.output.weight, linear.output.bias]


def build_fusion(settings: FusionSettings, dim: int, num_modalities: int) -> nn.Module:
    """Return the fusion that a configuration names, constructed as Class(dim, num_modalities, ...).

    A user's class, `package.module:Class`, gets `content.fusion.options` by name. Its
    `forward(tokens, mask, modality)` has the arguments of `ConcatFusion`.
    """
    options = settings.options
    if settings.name == "qformer":
        names = ("num_queries", "num_layers", "num_heads", "dropout", "preset")
        options = {name: getattr(settings, name) for name in names}
    where = "content.fusion.name"
    return make_part(where, settings.name, FUSIONS, nn.Module, dim, num_modalities, **options)
