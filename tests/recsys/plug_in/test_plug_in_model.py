"""A DLRM with content starts as the DLRM, and is then TorchRec's own model for F + K features."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import (
    DLRM,
    DenseArch,
    DLRMTrain,
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from embeddings import MemoryBank
from recsys.config import ContentSettings, ContrastiveSettings, FusionSettings, ModalitySettings
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import StoredFeatures
from recsys.data.batch import Batch, ContentInput
from recsys.model.losses import ContentIDContrastive
from recsys.plug_in import (
    DLRMWithContent,
    DLRMWithContentTrain,
    PlugInSettings,
    dlrm_state,
    load_dlrm,
)
from tests.ranks import run_on_ranks
from tests.recsys.content.item_batches import batch_of_items
from tests.recsys.plug_in.plug_in_runs import BATCH, DIM, KINDS, NUM_ITEMS, build_dlrm
from tests.recsys.plug_in.plug_in_runs import user_batches as torchrec_batches

WIDTH = 6  # of the stored feature
SETTINGS = ContentSettings(
    {"clip": ModalitySettings("feature", "clip")},
    dim=16,
    fusion=FusionSettings(num_heads=2, dropout=0.0),
)


def with_content(
    dlrm: DLRM,
    has_history: bool = True,
    contrastive: ContrastiveSettings | None = None,
    encoder: StoredFeatures | None = None,
) -> DLRMWithContent:
    bank = MemoryBank(NUM_ITEMS, SETTINGS.vector_dim, "cpu")
    bank.update(torch.arange(NUM_ITEMS), torch.randn(NUM_ITEMS, SETTINGS.vector_dim), step=0)
    branch = ContentBranch({"clip": encoder or StoredFeatures(WIDTH)}, SETTINGS, bank)
    items: Any = SimpleNamespace(branch=branch, batches=None)
    settings = PlugInSettings("shop", "item", SETTINGS, history="viewed" if has_history else None)
    if contrastive is not None:
        settings = replace(settings, contrastive=contrastive)
    return DLRMWithContent(dlrm, items, settings)


def content_batch() -> Batch:
    """A batch of TorchRec's, and the items that its features name."""
    user_batch = torchrec_batches(0, 1)[0]
    features = user_batch.sparse_features.to_dict()
    targets = features["item"].values().tolist()
    batch = batch_of_items(targets, [row.tolist() for row in features["viewed"].to_dense()])
    batch.history.values = batch.history.values[:, :0]
    items = len(batch.content.items)
    clip = ContentInput(torch.randn(items, 1, WIDTH), torch.ones(items, 1, dtype=torch.bool))
    batch.content.inputs = {"clip": clip}
    batch.dense_features = user_batch.dense_features
    batch.sparse_features, batch.labels = user_batch.sparse_features, user_batch.labels
    return batch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_history", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_logits_are_those_of_the_dlrm_to_the_last_bit(
    kind: str, has_history: bool
) -> None:
    dlrm, batch = build_dlrm(kind, "cpu"), content_batch()

    logits = with_content(dlrm, has_history)(batch)

    assert torch.equal(logits, dlrm(batch.dense_features, batch.sparse_features))


def statistics_after_a_step(rank: int, world_size: int) -> list[float]:
    """Running means of a layer in training and of a frozen one, which begin at the rank + 1."""
    torch.manual_seed(0)
    encoder, layers = StoredFeatures(WIDTH), [nn.BatchNorm1d(1), nn.BatchNorm1d(1).eval()]
    encoder.layers = nn.ModuleList(layers)
    for layer in layers:
        layer.running_mean.fill_(rank + 1)  # type: ignore[union-attr]
    with_content(build_dlrm("dlrm", "cpu"), encoder=encoder).content(content_batch())
    return [float(layer.running_mean) for layer in layers]  # type: ignore[arg-type]


def test_batch_normalisation_has_the_same_statistics_on_all_ranks() -> None:
    assert run_on_ranks(statistics_after_a_step, 2) == [[1.5, 1.0], [1.5, 2.0]]


def test_content_counts_once_its_weights_have_moved_from_zero() -> None:
    dlrm, batch = build_dlrm("dlrm", "cpu"), content_batch()
    model = with_content(dlrm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    fusion = model.content.branch.fusion
    old_queries = fusion.queries.clone()
    # The first step moves the new weights, the second the fusion's last maps below them, of which
    # that of the queries starts at zero, too; the third has a gradient for the queries.
    for step in range(3):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        assert fusion.queries.grad is not None
        assert bool(fusion.queries.grad.any()) == (step == 2)

    assert not torch.equal(fusion.queries, old_queries)
    assert not torch.equal(model(batch), dlrm(batch.dense_features, batch.sparse_features))


def randomised(module: nn.Module) -> None:
    """Moves all weights away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def first_linear(module: nn.Module) -> nn.Linear:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Linear))


def over_arch_over(
    model: DLRMWithContent, dlrm: DLRM, inputs: Tensor, columns: Tensor
) -> Tensor:  # [B, 1]
    """The over arch with one wide first layer, computed by hand."""
    assert model.content_head.over.columns is not None
    first = first_linear(dlrm.over_arch)
    weight = torch.cat([first.weight, model.content_head.over.columns.map.weight], dim=1)
    hidden = torch.cat([inputs, columns], dim=1) @ weight.T + first.bias
    last = [layer for layer in dlrm.over_arch.modules() if isinstance(layer, nn.Linear)][-1]
    return last(torch.relu(hidden))


def wide_dot(model: DLRMWithContent, dlrm: DLRM, dense: Tensor, sparse: Tensor) -> Any:
    """Of TorchRec's interaction of all F + K vectors: the old columns, and the new ones."""
    columns = InteractionArch(sparse.shape[1])(dense, sparse)
    first, second = torch.triu_indices(sparse.shape[1] + 1, sparse.shape[1] + 1, offset=1)
    is_new = torch.cat([torch.zeros(DIM, dtype=torch.bool), second > 3])
    assert len(first) + DIM == columns.shape[1]
    return columns[:, ~is_new], columns[:, is_new]


def wide_cross(model: DLRMWithContent, dlrm: DLRM, dense: Tensor, sparse: Tensor) -> Any:
    assert isinstance(dlrm.inter_arch, InteractionDCNArch)
    old, new = dlrm.inter_arch.crossnet, model.content_head.interaction.added
    assert isinstance(old, LowRankCrossNet)
    net = LowRankCrossNet((sparse.shape[1] + 1) * DIM, 2, 4)
    for layer in range(2):
        net.V_kernels[layer] = torch.cat([old.V_kernels[layer], new.V_kernels[layer]], dim=1)
        net.W_kernels[layer] = torch.cat([old.W_kernels[layer], new.W_kernels[layer]])
        net.bias[layer] = torch.cat([old.bias[layer], new.bias[layer]])
    crossed = InteractionDCNArch(sparse.shape[1], net)(dense, sparse)
    return crossed[:, : 4 * DIM], crossed[:, 4 * DIM :]


def wide_projection(model: DLRMWithContent, dlrm: DLRM, dense: Tensor, sparse: Tensor) -> Any:
    branches = []
    for name in ("1", "2"):
        old = getattr(dlrm.inter_arch, f"interaction_branch{name}")
        new = getattr(model.content_head.interaction, f"branch{name}")
        branch = DenseArch((sparse.shape[1] + 1) * DIM, [10, int(name) * DIM])
        weights = old.state_dict()
        (wide,) = [key for key, value in weights.items() if value.shape == (10, 4 * DIM)]
        weights[wide] = torch.cat([weights[wide], new.map.weight], dim=1)
        branch.load_state_dict(weights)
        branches.append(branch)
    columns = InteractionProjectionArch(sparse.shape[1], *branches)(dense, sparse)
    return columns, columns[:, :0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "wide"), [("dlrm", wide_dot), ("dcn", wide_cross), ("projection", wide_projection)]
)
def test_the_trained_model_is_torchrecs_own_for_more_features(
    kind: str, wide: Callable[..., Any]
) -> None:
    dlrm, batch = build_dlrm(kind, "cpu"), content_batch()
    model = with_content(dlrm)
    randomised(model)

    content = model.content(batch)
    dense = dlrm.dense_arch(batch.dense_features)
    sparse = dlrm.sparse_arch(batch.sparse_features)
    assert content.vectors.shape == (BATCH, 2, DIM)
    old, new = wide(model, dlrm, dense, torch.cat([sparse, content.vectors], dim=1))
    expected = over_arch_over(model, dlrm, old, torch.cat([new, content.features], dim=1))

    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_dlrm_train_plus_the_contrastive_one() -> None:
    dlrm, batch = build_dlrm("dlrm", "cpu"), content_batch()
    settings = ContrastiveSettings(weight=0.5, dim=8)
    train_model = DLRMWithContentTrain(with_content(dlrm, contrastive=settings))

    loss, (reported, logits, labels) = train_model(batch)

    loss_before, (_, logits_before, labels_before) = DLRMTrain(dlrm)(batch)
    assert torch.equal(logits, logits_before) and torch.equal(labels, labels_before)
    assert isinstance(train_model.contrastive, ContentIDContrastive)
    content = train_model.model.content(batch).target
    ids = dlrm.sparse_arch(batch.sparse_features)[:, 0]  # `item` is the first feature
    contrastive = train_model.contrastive(content, ids, batch.target.items)
    torch.testing.assert_close(loss, loss_before + 0.5 * contrastive)
    assert torch.equal(loss, reported) and not reported.requires_grad


def test_a_checkpoint_of_whole_tensors_is_taken_over_and_another_models_refused() -> None:
    old, batch = DLRMTrain(build_dlrm("dlrm", "cpu")), content_batch()
    model = DLRMWithContentTrain(with_content(build_dlrm("dlrm", "cpu")))

    load_dlrm(model, {"model": old.state_dict()})

    assert torch.equal(model(batch)[1][1], old(batch)[1][1])
    assert dlrm_state(model)["model"].keys() == old.state_dict().keys()
    other = DLRMTrain(build_dlrm("dcn", "cpu")).state_dict()
    with pytest.raises(ValueError, match=r"'model\.inter_arch\.\S+' .*checkpoint"):
        load_dlrm(model, {"model": other})
    with pytest.raises(ValueError, match=r"DLRMTrain .*DLRMWithContent"):
        dlrm_state(old)


class CustomForward(DLRM):
    def forward(self, dense_features: Tensor, sparse_features: Any) -> Tensor:
        return 2 * super().forward(dense_features, sparse_features)


def test_models_that_content_cannot_be_added_to_are_named() -> None:
    subclass, other, crossed = build_dlrm("dlrm"), build_dlrm("dlrm"), build_dlrm("dcn")
    subclass.__class__ = CustomForward
    other.inter_arch = nn.Identity()
    crossed.inter_arch = InteractionDCNArch(3, CrossNet(4 * DIM, 2))

    with pytest.raises(ValueError, match="CustomForward"):
        with_content(subclass)
    with pytest.raises(ValueError, match="class Identity"):
        with_content(other)
    with pytest.raises(ValueError, match=r"DLRM_DCN .*CrossNet"):
        with_content(crossed)
