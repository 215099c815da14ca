"""A content branch of two modalities with some content missing, and a batch for it."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import MemoryBank
from recsys.config import (
    ContentSettings,
    FusionSettings,
    HistorySettings,
    LoraSettings,
    ModalitySettings,
)
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import Encoder, StoredFeatures, build_encoder
from recsys.data.batch import Batch, BatchContent, ContentInput, History, Rows, TargetItems

NUM_ITEMS, DIM, FEATURE_DIM, MAX_TOKENS, NUM_MODALITIES = 8, 8, 6, 5, 2
BANK_DIM = DIM * (1 + NUM_MODALITIES)  # the content vector and a mean token per modality
TARGETS = torch.tensor([3, 5, 3, 7, 5])
HISTORY = torch.tensor([5, 3, 5, 0, 1, 3, 3])
LENGTHS = torch.tensor([2, 0, 4, 1, 0])
TEXT = ModalitySettings(
    kind="text",
    column="text",
    encoder="random:bert",
    training="lora",
    lora=LoraSettings(rank=2, top_layers=1),
    max_length=MAX_TOKENS,
)
Mode = Literal["bank_lora", "bank_frozen", "bank_dense", "full"]


def content_of(items: Tensor) -> dict[str, ContentInput]:
    """Text and features of all items; 3 lacks text, 5 features, 0 both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (NUM_ITEMS, MAX_TOKENS), generator=generator)
    lengths = torch.tensor([0, 5, 2, 0, 4, 3, 1, 2])
    mask = torch.arange(MAX_TOKENS)[None, :] < lengths[:, None]
    features = torch.randn(NUM_ITEMS, 1, FEATURE_DIM, generator=generator)
    has_clip = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1]).bool().unsqueeze(1)
    return {
        "text": ContentInput(torch.where(mask, ids, 0)[items], mask[items]),
        "clip": ContentInput(torch.where(has_clip[..., None], features, 0)[items], has_clip[items]),
    }


def batch_of(mode: Mode) -> Batch:
    """Unique items and indices, as the loader makes them."""
    history_items, history_index = HISTORY.unique(return_inverse=True)
    encoded = torch.cat([TARGETS, history_items if mode == "full" else HISTORY[:0]])
    items, index = encoded.unique(return_inverse=True)
    return Batch(
        dense_features=torch.zeros(len(TARGETS), 0),
        sparse_features=None,
        labels=torch.zeros(len(TARGETS), 1),
        sequence_features=KeyedJaggedTensor.from_lengths_sync(
            ["item"], TARGETS, torch.ones(len(TARGETS), dtype=torch.long)
        ),
        rows=Rows(torch.arange(len(TARGETS)), torch.zeros(len(TARGETS), dtype=torch.long)),
        target=TargetItems(TARGETS),
        history=History(
            LENGTHS,
            torch.zeros(len(HISTORY), 0),
            int(LENGTHS.max()),
            history_index,
            history_items,
        ),
        content=BatchContent(
            items,
            index[: len(TARGETS)],
            index[len(TARGETS) :],
            content_of(items),
        ),
    )


def branch_of(mode: Mode) -> ContentBranch:
    torch.manual_seed(0)
    encoders: dict[str, Encoder] = {
        "text": build_encoder("text", TEXT, None),
        "clip": StoredFeatures(FEATURE_DIM),
    }
    settings = ContentSettings(
        modalities={"text": TEXT, "clip": ModalitySettings(kind="feature", column="clip")},
        dim=DIM,
        fusion=FusionSettings(num_heads=2, dropout=0.0),
        history=HistorySettings(mode=mode, lora_rank=2),
    )
    bank = None
    if mode != "full":
        assert settings.vector_dim == BANK_DIM
        bank = MemoryBank(NUM_ITEMS, BANK_DIM, "cpu")
        stale = torch.randn(NUM_ITEMS, BANK_DIM, generator=torch.Generator().manual_seed(4))
        bank.update(torch.arange(NUM_ITEMS), stale, step=0)
    branch = ContentBranch(encoders, settings, bank)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide much
            nn.init.normal_(parameter)
    return branch.train()
