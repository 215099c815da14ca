"""Content in an existing DLRM: torchrec's DLRM, DLRM_DCN or DLRM_Projection.

Names in the DLRM's checkpoints stay, and the first logits equal the DLRM's bit by bit. Tensors of
`dlrm_state`, whole or sharded, share memory with model and optimizer: loading into them loads both.
Shapes: B batch, F sparse features, K content vectors, D dimension of the DLRM, C of content,
S further features.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from recsys.config import ContentSettings
from recsys.content.branch import ContentBranch
from recsys.data.batch import Batch
from recsys.model.losses import ContentIDContrastive
from recsys.optimizer.dense import DenseGroup, parameter_groups
from recsys.optimizer.running_statistics import RunningStatistics
from recsys.plug_in.batches import ContentBatches, ItemContent
from recsys.plug_in.interactions import WidenedModule, widened_interaction
from recsys.plug_in.settings import ContentRates, PlugInSettings
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.fields import history_numbers, num_history_numbers


class ContentInputs(NamedTuple):
    """Inputs that content adds to a DLRM."""

    vectors: Tensor  # [B, K, D], of the target and, with a history, the user's interest in it
    features: Tensor  # [B, S], similarities of target and history, for the over arch
    target: Tensor  # [B, C], the target item's content vector itself


class ContentInputLayer(nn.Module):
    """Maps a batch to `ContentInputs`: the content branch, and the interest of `recsys.ranking`."""

    def __init__(
        self, branch: ContentBranch, settings: ContentSettings, dim: int, has_history: bool
    ) -> None:
        super().__init__()
        self.branch, self.dim = branch, settings.dim
        self.statistics = RunningStatistics(branch)
        self.target_map = nn.Linear(settings.dim, dim)
        self.num_vectors, self.num_features = 1, 0
        self.interest: ContentInterest | None = None
        if has_history:
            num_modalities = len(branch.encoders)
            self.interest = ContentInterest(settings.dim, num_modalities, 0, settings.history)
            self.interest_map = nn.Linear(settings.dim, dim)
            self.num_vectors = 2
            self.num_features = self.interest.output_dim - settings.dim + num_history_numbers(0)

    def forward(self, batch: Batch) -> ContentInputs:
        """Return the inputs; in training a collective if encoders have batch normalisation."""
        content = self.branch(batch)
        self.statistics.average()
        vectors = [self.target_map(content.target)]
        features = content.target.new_zeros(len(content.target), 0)
        if self.interest is not None:
            # The first C columns of the interest are its vector, the others single features.
            history, parallel = batch.history.jagged(), batch.history.values
            interest = self.interest(content, history, parallel)
            vectors.append(self.interest_map(interest[:, : self.dim]))
            numbers = history_numbers(history, parallel)
            features = torch.cat([numbers, interest[:, self.dim :]], dim=1)
        return ContentInputs(torch.stack(vectors, dim=1), features, content.target)


class ContentHead(nn.Module):
    """Interaction and over arch of a DLRM, with content as input of both."""

    def __init__(self, dlrm: DLRM, num_vectors: int, num_features: int, dim: int) -> None:
        super().__init__()
        self.interaction = widened_interaction(dlrm.inter_arch, num_vectors, dim)
        self.over = WidenedModule(dlrm.over_arch, self.interaction.num_columns + num_features)

    def forward(
        self, dense: Tensor, sparse: Tensor, content: ContentInputs
    ) -> Tensor:  # [B, D], [B, F, D] -> [B, 1]
        interaction, columns = self.interaction(dense, sparse, content.vectors)
        logits: Tensor = self.over(interaction, torch.cat([columns, content.features], dim=1))
        return logits


def require_dlrm(model: nn.Module) -> None:
    """Raise a ValueError unless content can be added to the model."""
    if not isinstance(model, DLRM) or type(model).forward is not DLRM.forward:
        raise ValueError(
            f"content can be added to torchrec's DLRM, DLRM_DCN and DLRM_Projection; a "
            f"{type(model).__name__} computes something of its own. For a model of your own, "
            "recsys.plug_in.build_item_content gives the encoder of items and batches with content"
        )


def require_plain_loss(model: DLRMTrain) -> None:
    """Raise a ValueError if a DLRMTrain computes more than `loss_fn` of logits and labels."""
    if type(model).forward is not DLRMTrain.forward:
        raise ValueError(
            f"a {type(model).__name__} computes a loss of its own, which content would replace by "
            "DLRMTrain's; set `loss_fn` of a DLRMTrain, or give add_content the DLRM alone and "
            "compute your loss of its logits"
        )


class DLRMWithContent(nn.Module):
    """A DLRM whose interaction has K more vectors: the target's content, and the content interest.

    `add_content` builds it. The DLRM itself stays usable, also after this model is sharded.
    """

    dense_arch: nn.Module
    sparse_arch: nn.Module

    def __init__(self, dlrm: DLRM, items: ItemContent, settings: PlugInSettings) -> None:
        super().__init__()
        require_dlrm(dlrm)
        self.items, self.batches, self.contrastive = items, items.batches, settings.contrastive
        self.item_index = dlrm.sparse_arch.sparse_feature_names.index(settings.item)
        for name, child in dlrm.named_children():
            self.add_module(name, child)
        dim, has_history = dlrm.sparse_arch.D, settings.history is not None
        self.content = content = ContentInputLayer(items.branch, settings.content, dim, has_history)
        self.content_head = ContentHead(dlrm, content.num_vectors, content.num_features, dim)

    def rank(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, 1], and the target's ID embedding [B, D] and content vector [B, C]."""
        content = self.content(batch)
        dense = self.dense_arch(batch.dense_features)
        sparse = self.sparse_arch(batch.sparse_features)
        logits = self.content_head(dense, sparse, content)
        return logits, sparse[:, self.item_index], content.target

    def forward(self, batch: Batch) -> Tensor:  # [B, 1]
        return self.rank(batch)[0]


class DLRMWithContentTrain(nn.Module):
    """Maps a batch to (loss, (loss, logits [B], labels [B])), like torchrec's DLRMTrain.

    Adds `contrastive.weight` times the Content-ID-Contrastive loss to `loss_fn`. With `rates`, an
    AdamW trains the new parameters.
    """

    def __init__(
        self,
        model: DLRMWithContent,
        rates: ContentRates | None = None,
        loss_fn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.items, self.rates = model, model.items, rates
        self._has_optimizer = rates is None
        self.loss_fn = nn.BCEWithLogitsLoss() if loss_fn is None else loss_fn
        self.weight = model.contrastive.weight
        self.contrastive: ContentIDContrastive | None = None
        if self.weight > 0:
            content_dim, dim = model.content.dim, model.content.target_map.out_features
            self.contrastive = ContentIDContrastive(content_dim, dim, model.contrastive)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits, item, content = self.model.rank(batch)
        logits = logits.squeeze(-1)
        loss = self.loss_fn(logits, batch.labels.float())
        if self.contrastive is not None:
            loss = loss + self.weight * self.contrastive(content, item, batch.target.items)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())

    def optimizer(self, optimizer: KeyedOptimizer) -> KeyedOptimizer:
        """Return the user's optimizer, combined with an AdamW that takes over new parameters."""
        if self.rates is None:
            return optimizer
        combined = with_content_optimizer(optimizer, self, self.rates)
        self._has_optimizer = True
        return combined

    def batches(self, source: Iterable[TorchRecBatch]) -> ContentBatches:
        """Return the batches of a dataset or data loader with content; see `ItemContent`."""
        return self.items.batches(source, self._require_optimizer)

    def _require_optimizer(self) -> None:
        if not self._has_optimizer:
            raise ValueError(
                "the new parameters have no optimizer of their own: add `optimizer = "
                "train_model.optimizer(optimizer)` after yours, or set `optimizer: null` in the "
                "settings to train them with yours"
            )


def new_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of all names that the DLRM alone does not have."""
    inner = get_unwrapped_module(model) if isinstance(model, DistributedModelParallel) else model
    prefixes = []
    for name, module in inner.named_modules():
        path = f"{name}." if name else ""
        if isinstance(module, DLRMWithContentTrain):
            prefixes.append(f"{path}contrastive.")
        if isinstance(module, DLRMWithContent):
            return (*prefixes, f"{path}content.", f"{path}content_head.")
    raise ValueError(f"{type(inner).__name__} holds no DLRMWithContent; give it the whole model")


def with_content_optimizer(
    optimizer: KeyedOptimizer, model: nn.Module, rates: ContentRates
) -> CombinedOptimizer:
    """Take the new parameters out of the user's optimizer, and add an AdamW for them."""
    if not isinstance(optimizer, KeyedOptimizer):
        raise ValueError(
            f"the optimizer is a {type(optimizer).__name__}; give a torchrec KeyedOptimizer, such "
            "as CombinedOptimizer([model.fused_optimizer, KeyedOptimizerWrapper(...)])"
        )
    prefixes, decay = new_prefixes(model), rates.weight_decay
    dense = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
    _remove_parameters(optimizer, {id(parameter) for parameter in dense.values()})
    trained = {name: parameter for name, parameter in dense.items() if parameter.requires_grad}
    encoder_prefixes = [f"{prefix}branch.encoders." for prefix in prefixes]
    encoders = DenseGroup("encoders", encoder_prefixes, rates.encoder_learning_rate, decay)
    content = DenseGroup("content", [""], rates.learning_rate, decay)
    groups = parameter_groups(model, trained, [encoders, content])
    ordered = {name: trained[name] for group in groups for name in group.pop("names")}
    adamw = torch.optim.AdamW(groups, fused=True)
    return CombinedOptimizer([optimizer, KeyedOptimizerWrapper(ordered, lambda _: adamw)])


def _remove_parameters(optimizer: KeyedOptimizer, parameters: set[int]) -> None:
    if isinstance(optimizer, CombinedOptimizer):
        for _, inner in optimizer.optimizers:
            _remove_parameters(inner, parameters)
        return
    by_name: Any = optimizer.params
    for name in [name for name, parameter in by_name.items() if id(parameter) in parameters]:
        optimizer.state.pop(by_name.pop(name), None)
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in parameters]


def dlrm_state(
    model: nn.Module, optimizer: KeyedOptimizer | None = None
) -> dict[str, dict[str, Any]]:
    """Return the content of a checkpoint of the DLRM alone: {"model": ..., "optimizer": ...}.

    To load, create the optimizer's state (`init_state`), pass the result to
    `torch.distributed.checkpoint.load` and then to `load_dlrm`. An optimizer without state, such as
    plain SGD, is left out.

    Example::

        from recsys.plug_in import add_content, dlrm_state, load_dlrm

        model = add_content(dlrm, "content.yaml", device)
        state = dlrm_state(model)  # torch.distributed.checkpoint.load(state, ...) fills it
        assert state["model"].keys() == dlrm.state_dict().keys()
        load_dlrm(model, state)
    """
    names = new_prefixes(model)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(names)}
    moments = optimizer.state_dict()["state"] if optimizer is not None else {}
    moments = {key: value for key, value in moments.items() if value and not key.startswith(names)}
    return {"model": weights} | ({"optimizer": {"state": moments}} if moments else {})


def load_dlrm(
    model: nn.Module,
    state: Mapping[str, Mapping[str, Any]],
    optimizer: KeyedOptimizer | None = None,
) -> None:
    """Load a DLRM's checkpoint; the content parameters do not change.

    `state` is {"model": ..., "optimizer": ...}, as `dlrm_state` returns it.

    Raises:
        ValueError: the state is not that of this DLRM, with the first name that differs.

    Example::

        from recsys.plug_in import add_content, load_dlrm

        model = add_content(dlrm, "content.yaml", device)
        load_dlrm(model, {"model": dlrm.state_dict()})
    """
    current = dlrm_state(model, optimizer)
    _check_names(current["model"], state["model"], "model")
    model.load_state_dict({**model.state_dict(), **state["model"]})
    if optimizer is not None:
        empty: dict[str, Any] = {"state": {}}
        loaded = state.get("optimizer", empty)["state"]
        loaded = {key: value for key, value in loaded.items() if value}
        _check_names(current.get("optimizer", empty)["state"], loaded, "optimizer")
        moments = optimizer.state_dict()
        moments["state"] = {**moments["state"], **loaded}
        optimizer.load_state_dict(moments)


def _check_names(expected: Mapping[str, Any], loaded: Mapping[str, Any], kind: str) -> None:
    for name in sorted(expected.keys() ^ loaded.keys()):
        owner = "this DLRM" if name in expected else "the checkpoint"
        raise ValueError(
            f"{kind} state '{name}' is only in {owner}; a checkpoint fits the DLRM it was written "
            "by, and an optimizer that has state (`optimizer.init_state()`)"
        )
