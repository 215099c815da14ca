"""Fit the blend of ranking model and neighbours on rows that the network was not trained on.

Shapes: N rows, C labels, E evidence statistics of the neighbours.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.build import Job
from recsys.model.losses import label_losses
from recsys.ranking.neighbours import NUM_BLENDED, Blend

PRIOR_ROWS = 10.0  # weight of the regularisation toward the unfitted blend, in rows


def fit_blend(job: Job, scored: dict[str, Tensor]) -> None:
    """Fit the blend to scored rows on rank 0, and broadcast it to all ranks. A collective.

    Replaces `scored["logits"]` by cross-fitted logits, of blends fitted to other users.
    """
    neighbours, ranks = job.em3.neighbours, job.ranks
    if neighbours is None:
        return
    with ranks.raise_on_all_ranks():
        # `require_finite` reports logits that are not finite later, with their rows.
        if ranks.is_first and len(scored["logits"]) and scored["logits"].isfinite().all():
            losses = job.schema.label_losses
            scored["logits"] = cross_fitted_logits(scored, losses)
            fitted = fitted_blend(scored, losses)
            neighbours.blend.load_state_dict(fitted.state_dict())
    for buffer in neighbours.blend.buffers():
        dist.broadcast(buffer, src=0, group=ranks.group)


def cross_fitted_logits(scored: dict[str, Tensor], losses: tuple[str, ...]) -> Tensor:  # [N, C]
    """Return logits for each half of the users from a blend fitted to the other half."""
    _, users = scored["groups"].unique(return_inverse=True)
    logits = scored["network"].clone()
    for half in range(2):
        is_scored = users % 2 == half
        other_users = {name: values[~is_scored] for name, values in scored.items()}
        blend = fitted_blend(other_users, losses)
        logits[is_scored] = blend.logits(
            scored["network"][is_scored],
            scored["evidence_logits"][is_scored],
            scored["evidence"][is_scored],
        )
    return logits


def fitted_blend(scored: dict[str, Tensor], losses: tuple[str, ...]) -> Blend:
    """Return the blend with the least loss on scored rows, found by L-BFGS.

    Inputs are standardised; weights and bias are regularised toward those of an unfitted blend.
    """
    names = ("network", "evidence_logits", "evidence", "labels")
    network, evidence_logits, evidence, labels = (scored[name].double() for name in names)
    evidence = evidence[:, :NUM_BLENDED]
    blend = Blend(labels.shape[1])
    weights = scored["weights"].double() if "weights" in scored else torch.ones(len(labels))
    for label, loss in enumerate(losses):
        rows = ~labels[:, label].isnan() & (weights > 0)
        models = torch.stack([network[:, label], evidence_logits[:, label]], dim=1)
        inputs = torch.cat([models, evidence], dim=1)
        if rows.any():
            weight, bias = _fitted(inputs[rows], labels[rows, label], weights[rows], loss)
            blend.weight[label], blend.bias[label] = weight.float(), bias.float()
    return blend


def _fitted(
    inputs: Tensor, labels: Tensor, row_weights: Tensor, loss: str
) -> tuple[Tensor, Tensor]:
    """Return weight [2 + E] and bias [] for inputs [N, 2 + E], the network's logit first."""
    center, scale = inputs.mean(0), inputs.std(0, unbiased=False)
    scale = torch.where(scale > 1e-6, scale, 1.0)
    standardized = (inputs - center) / scale
    prior = torch.zeros_like(scale)
    prior[0] = scale[0]
    weight = prior.clone().requires_grad_()
    bias = center[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = (standardized @ weight + bias).unsqueeze(1)
        errors = label_losses(logits, labels.unsqueeze(1), (loss,)).squeeze(1)
        # Without regularisation, the bias would diverge if all labels are equal.
        distance = (weight - prior).square().sum() + (bias - center[0]).square()
        mean = ((row_weights * errors).sum() + PRIOR_ROWS * distance) / len(labels)
        mean.backward()
        return mean

    with torch.enable_grad():
        optimizer.step(closure)
    result = weight.detach() / scale
    return result, bias.detach() - (result * center).sum()
