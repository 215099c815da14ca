"""The types in which looked-up vectors travel between ranks, and their gradients back.

A 16-bit type halves the bytes sent and rounds each value once (DLRM with quantised
collectives, Yang et al. 2020). FBGEMM's codecs convert, through TorchRec's registry of codecs by
collective. Ids and the tables themselves keep their types.
"""

from __future__ import annotations

from typing import Literal, get_args

from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

CommunicationType = Literal["fp32", "fp16", "bf16"]


def communication_codecs(
    forward: CommunicationType, backward: CommunicationType
) -> dict[str, QuantizedCommCodecs] | None:
    """Build TorchRec's codecs for every collective of embeddings; None where both types are fp32.

    fp16 rounds to 11 bits and clamps to 65504, bf16 rounds to 8 bits and keeps the range of fp32.
    A gradient is divided by the batch size and may be too small for fp16, below 6e-8: prefer
    bf16 for ``backward``. With a single rank nothing is rounded.

    TorchRec's own ``get_qcomm_codecs_registry`` is not used: on CPU it replaces bf16 by fp16 with
    only a warning, though both work over gloo.

    Raises:
        ValueError: an unknown type.
    """
    known = get_args(CommunicationType)
    for direction, name in (("forward", forward), ("backward", backward)):
        if name not in known:
            raise ValueError(
                f"communication {direction} is '{name}', which is no type that vectors can travel "
                f"in; choose one of {list(known)}"
            )
    if forward == backward == "fp32":
        return None
    types = QCommsConfig(CommType(forward), CommType(backward))
    return {operation.name: get_qcomm_codecs(types) for operation in CommOp}
