"""Native kernels, operators of torch.library, and the choice between them and PyTorch."""

from recsys.kernels.choice import choose_kernels as choose_kernels
from recsys.kernels.choice import has_native as has_native
from recsys.kernels.choice import log_refusal as log_refusal
from recsys.kernels.choice import prepare_kernels as prepare_kernels
from recsys.kernels.choice import refused_kernels as refused_kernels
from recsys.kernels.operators import native_content_interest as native_content_interest
from recsys.kernels.operators import native_dot_interaction as native_dot_interaction
from recsys.kernels.operators import native_fusion as native_fusion
from recsys.kernels.operators import result_dtype as result_dtype
from recsys.kernels.target_attention import ScoreWeights as ScoreWeights
from recsys.kernels.target_attention import native_target_attention as native_target_attention
from recsys.kernels.target_attention import shared_target_attention as shared_target_attention
