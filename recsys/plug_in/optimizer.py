"""The optimizer of the new parameters, AdamW, beside the user's of all others.

Content has its own learning rates: a rate that suits a DLRM, such as 15.0 for plain SGD in
TorchRec's example, destroys an encoder in one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from recsys.optimizer.groups import DenseGroup, parameter_groups
from recsys.plug_in.model import new_prefixes
from recsys.plug_in.settings import ContentRates


def with_content_optimizer(
    optimizer: KeyedOptimizer, model: nn.Module, rates: ContentRates
) -> CombinedOptimizer:
    """Take the new parameters out of the user's optimizer, and combine it with an AdamW for them.

    Raises:
        ValueError: the optimizer is no KeyedOptimizer.
    """
    if not isinstance(optimizer, KeyedOptimizer):
        raise ValueError(
            f"the optimizer is a {type(optimizer).__name__}; give a torchrec KeyedOptimizer, such "
            "as CombinedOptimizer([model.fused_optimizer, KeyedOptimizerWrapper(...)])"
        )
    prefixes = new_prefixes(model)
    new = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
    _take_out(optimizer, {id(parameter) for parameter in new.values()})
    trained = {name: parameter for name, parameter in new.items() if parameter.requires_grad}
    encoders = [f"{prefix}branch.encoders." for prefix in prefixes]
    decay = rates.weight_decay
    groups = parameter_groups(
        model,
        trained,
        [
            DenseGroup("encoders", encoders, rates.encoder_learning_rate, decay),
            DenseGroup("content", [""], rates.learning_rate, decay),
        ],
    )
    ordered = {name: trained[name] for group in groups for name in group.pop("names")}
    adamw = torch.optim.AdamW(groups, fused=True)
    return CombinedOptimizer([optimizer, KeyedOptimizerWrapper(ordered, lambda _: adamw)])


def _take_out(optimizer: KeyedOptimizer, parameters: set[int]) -> None:
    """Remove parameters, given by their ids, from an optimizer and those inside it."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            _take_out(part, parameters)
        return
    named: Any = optimizer.params
    for name in [name for name, parameter in named.items() if id(parameter) in parameters]:
        optimizer.state.pop(named.pop(name), None)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in parameters]
        group["params"][:] = kept
