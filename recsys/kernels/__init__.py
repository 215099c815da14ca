"""Native kernels of single operations, and the choice between them and PyTorch.

Each kernel is an operator of torch.library with a fake kernel and a backward, so that
`torch.compile` sees it. The slow reference is the layer that calls it.
"""

from recsys.kernels.checks import result_dtype
from recsys.kernels.choice import choose_kernels, has_native, rounds_products
from recsys.kernels.content_interest import native_content_interest
from recsys.kernels.contrastive import native_in_batch_contrastive
from recsys.kernels.dot_interaction import native_dot_interaction
from recsys.kernels.few_token_attention import native_few_token_attention
from recsys.kernels.fusion import AttentionSettings, native_fusion
from recsys.kernels.target_attention import ScoreWeights, native_target_attention

__all__ = [
    "AttentionSettings",
    "ScoreWeights",
    "choose_kernels",
    "has_native",
    "native_content_interest",
    "native_dot_interaction",
    "native_few_token_attention",
    "native_fusion",
    "native_in_batch_contrastive",
    "native_target_attention",
    "result_dtype",
    "rounds_products",
]
