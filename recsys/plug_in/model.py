"""Content in an existing DLRM: torchrec's DLRM, DLRM_DCN or DLRM_Projection.

The DLRM's own parts stay unchanged. `DLRMWithContent` has them as children under the names they
have in the DLRM, so that tables, optimizers and checkpoints keep their names; two more children
hold the new parts. The first logits equal those of the DLRM to the last bit, since content enters
through weights that start at zero.

The top forward is a straight line, as `TrainPipelineSparseDist` traces it. The tracer does not
enter direct children, so the new parts must be two children instead of one.

Shapes: B batch, F sparse features, K content vectors, D dimension of the DLRM, C of content,
S further features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.models.dlrm import DLRM

from recsys.config import ContentSettings, ContrastiveSettings
from recsys.content.branch import ContentBranch
from recsys.data.batch import Batch
from recsys.model.losses import ContentIDContrastive
from recsys.plug_in.interactions import WidenedModule, no_columns, widened_interaction
from recsys.ranking.layers.content_interest import ContentInterest
from recsys.ranking.layers.fields import history_numbers, num_history_numbers


class ContentInputs(NamedTuple):
    """Inputs that content adds to a DLRM.

    vectors: [B, K, D], of the target item and, with a history, the user's interest in it.
    features: [B, S], similarities of target and history, for the over arch.
    target: [B, C], the target item's content vector itself.
    """

    vectors: Tensor
    features: Tensor
    target: Tensor


class Ranked(NamedTuple):
    """Logits [B, 1], and the target's ID embedding [B, D] and content vector [B, C]."""

    logits: Tensor
    item: Tensor
    content: Tensor


class ContentOfBatch(nn.Module):
    """Maps a batch to `ContentInputs`: the content branch, and the interest of `recsys.ranking`."""

    def __init__(
        self, branch: ContentBranch, settings: ContentSettings, dim: int, has_history: bool
    ) -> None:
        super().__init__()
        self.branch = branch
        self.dim = settings.dim
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
        content = self.branch(batch)
        vectors, features = [self.target_map(content.target)], no_columns(content.target)
        if self.interest is not None:
            # The first C columns of the interest are its vector, the others single features.
            history, parallel = batch.jagged_history(), batch.history_values
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
        self,
        dense: Tensor,  # [B, D]
        sparse: Tensor,  # [B, F, D]
        vectors: Tensor,  # [B, K, D]
        features: Tensor,  # [B, S]
    ) -> Tensor:  # [B, 1]
        interaction, columns = self.interaction(dense, sparse, vectors)
        logits: Tensor = self.over(interaction, torch.cat([columns, features], dim=1))
        return logits


def require_dlrm(model: nn.Module) -> None:
    """Raise a ValueError unless content can be added to the model."""
    if not isinstance(model, DLRM) or type(model).forward is not DLRM.forward:
        raise ValueError(
            f"content can be added to torchrec's DLRM, DLRM_DCN and DLRM_Projection; a "
            f"{type(model).__name__} computes something of its own. For a model of your own, "
            "recsys.plug_in.build_item_content gives the encoder of items and batches with content"
        )


class DLRMWithContent(nn.Module):
    """A DLRM whose interaction has K more vectors: the target's content, and the content interest.

    Its children are the DLRM's own modules and two of content; the DLRM itself stays usable, also
    after this model is sharded. `recsys.plug_in.add_content` builds it from settings.

    Args:
        dlrm: DLRM, DLRM_DCN or DLRM_Projection, its tables on meta or not.
        branch: encodes the items of `recsys.Batch`.
        settings: of the branch; `history` selects the similarities that become features.
        item: the sparse feature that holds the id of the ranked item.
        has_history: whether batches have a history.
        contrastive: of the Content-ID-Contrastive loss, for `DLRMWithContentTrain`.

    Raises:
        ValueError: the model is of another class, or has no such feature.

    Example::

        import torch
        from torchrec.models.dlrm import DLRM
        from torchrec.modules.embedding_configs import EmbeddingBagConfig
        from torchrec.modules.embedding_modules import EmbeddingBagCollection

        from embeddings import MemoryBank
        from recsys import ContentBranch
        from recsys.config import ContentSettings, ModalitySettings
        from recsys.content.encoders.build import StoredFeatures
        from recsys.plug_in import DLRMWithContent

        table = EmbeddingBagConfig(
            name="item", num_embeddings=100, embedding_dim=8, feature_names=["item"]
        )
        dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [8], [8, 1])
        settings = ContentSettings({"photo": ModalitySettings("feature", "photo")}, dim=16)
        bank = MemoryBank(100, settings.vector_dim, "cpu")
        branch = ContentBranch({"photo": StoredFeatures(32)}, settings, bank)
        model = DLRMWithContent(dlrm, branch, settings, item="item", has_history=True)
        assert model.state_dict().keys() > dlrm.state_dict().keys()
    """

    dense_arch: nn.Module
    sparse_arch: nn.Module
    content: ContentOfBatch
    content_head: ContentHead

    def __init__(
        self,
        dlrm: DLRM,
        branch: ContentBranch,
        settings: ContentSettings,
        item: str,
        has_history: bool,
        contrastive: ContrastiveSettings | None = None,
    ) -> None:
        super().__init__()
        require_dlrm(dlrm)
        features = dlrm.sparse_arch.sparse_feature_names
        if item not in features:
            raise ValueError(f"the DLRM has no sparse feature '{item}'; it has {features}")
        self.item_place = features.index(item)
        self.contrastive = contrastive or ContrastiveSettings()
        for name, part in dlrm.named_children():
            self.add_module(name, part)
        dim = dlrm.sparse_arch.D
        content = ContentOfBatch(branch, settings, dim, has_history)
        self.content = content
        self.content_head = ContentHead(dlrm, content.num_vectors, content.num_features, dim)

    def rank(self, batch: Batch) -> Ranked:
        """Return logits, and the vectors of the target item that the contrastive loss compares."""
        content = self.content(batch)
        dense = self.dense_arch(batch.dense_features)
        sparse = self.sparse_arch(batch.sparse_features)
        logits = self.content_head(dense, sparse, content.vectors, content.features)
        return Ranked(logits, sparse[:, self.item_place], content.target)

    def forward(self, batch: Batch) -> Tensor:  # [B, 1]
        return self.rank(batch).logits


class DLRMWithContentTrain(nn.Module):
    """Maps a batch to (loss, (loss, logits [B], labels [B])), like torchrec's DLRMTrain.

    The loss is DLRMTrain's and, if `contrastive.weight` is above 0, that weight times the
    Content-ID-Contrastive loss between the target's content and its row of the item table.

    Example::

        from recsys.plug_in import DLRMWithContentTrain, add_content

        model = add_content(dlrm, "content.yaml", device)
        train_model = DLRMWithContentTrain(model)
        loss, (_, logits, labels) = train_model(next(iter(model.batches(loader))))
    """

    def __init__(self, model: DLRMWithContent) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = nn.BCEWithLogitsLoss()
        self.weight = model.contrastive.weight
        self.contrastive: ContentIDContrastive | None = None
        if self.weight > 0:
            dims = model.content.dim, model.content.target_map.out_features
            self.contrastive = ContentIDContrastive(*dims, model.contrastive)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        ranked = self.model.rank(batch)
        logits = ranked.logits.squeeze(-1)
        loss = self.loss_fn(logits, batch.labels.float())
        if self.contrastive is not None:
            contrastive = self.contrastive(ranked.content, ranked.item, batch.target_items)
            loss = loss + self.weight * contrastive
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def new_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of all names that the DLRM alone does not have."""
    inner = get_unwrapped_module(model) if isinstance(model, DistributedModelParallel) else model
    new = []
    for name, module in inner.named_modules():
        path = f"{name}." if name else ""
        if isinstance(module, DLRMWithContentTrain):
            new.append(f"{path}contrastive.")
        if isinstance(module, DLRMWithContent):
            return (*new, f"{path}content.", f"{path}content_head.")
    raise ValueError(f"{type(inner).__name__} holds no DLRMWithContent; give it the whole model")
