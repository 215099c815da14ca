"""TermEncoder: a text as the bag of its words or tags.

Shapes: U unique items, T terms of the longest text, R rows of the table, D width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize

from embeddings.vocabulary.fixed import mix64
from recsys.content.encoders.base import Encoder
from recsys.data.items.kind import ContentInput

ROWS_PER_BLOCK = 1024  # of the table, whose signs are hashed at a time


class TermEncoder(Encoder):
    """Sum of the embeddings of an item's terms, of length 1: rows int64 [U, T] -> [U, 1, D].

    All runs begin with the same random signs. The cosine of two sums of them is about that of the
    bags (Achlioptas 2003), so that the first projection, by principal components, is a latent
    semantic analysis of the training items.
    """

    caches = False

    def __init__(self, num_embeddings: int, dim: int, trains: bool) -> None:
        super().__init__()
        self.output_dim = dim
        self.weight = nn.Parameter(random_signs(num_embeddings, dim), requires_grad=trains)

    def forward(self, content: ContentInput) -> ContentInput:
        weights = content.mask.to(self.weight.dtype)
        sums = embedding_bag(content.values, self.weight, mode="sum", per_sample_weights=weights)
        tokens = normalize(sums, dim=1).unsqueeze(1)
        return ContentInput(tokens, content.mask.any(dim=1, keepdim=True))


def random_signs(num_rows: int, dim: int) -> Tensor:  # float32 [R, D]
    """Return rows of length 1 whose signs depend on their position alone."""
    signs = np.empty((num_rows, dim), np.float32)
    for row in range(0, num_rows, ROWS_PER_BLOCK):
        block = signs[row : row + ROWS_PER_BLOCK]
        bits = mix64(np.arange(row * dim, row * dim + block.size)) & np.uint64(1)
        block[:] = bits.reshape(block.shape) * np.float32(2) - np.float32(1)
    return torch.as_tensor(signs / np.float32(dim**0.5), device=torch.get_default_device())
