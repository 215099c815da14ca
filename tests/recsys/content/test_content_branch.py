"""The content branch: encoding unique items once against encoding every occurrence naively."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import pytest
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
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch, ContentInput

NUM_ITEMS, DIM, FEATURE_DIM, MAX_TOKENS, NUM_MODALITIES = 8, 8, 6, 5, 2
KEPT_DIM = DIM * (1 + NUM_MODALITIES)  # the content vector and a mean token per modality
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
    known = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1]).bool().unsqueeze(1)
    return {
        "text": ContentInput(torch.where(mask, ids, 0)[items], mask[items]),
        "clip": ContentInput(torch.where(known[..., None], features, 0)[items], known[items]),
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
        target_items=TARGETS,
        groups=torch.zeros(len(TARGETS), dtype=torch.long),
        row_positions=torch.arange(len(TARGETS)),
        history_lengths=LENGTHS,
        history_values=torch.zeros(len(HISTORY), 0),
        history_items=history_items,
        history_index=history_index,
        content_items=items,
        target_index=index[: len(TARGETS)],
        history_content_index=index[len(TARGETS) :],
        bank_items=HISTORY[:0],
        content=content_of(items),
        longest_history=int(LENGTHS.max()),
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
        assert settings.vector_dim == KEPT_DIM
        bank = MemoryBank(NUM_ITEMS, KEPT_DIM, "cpu")
        stale = torch.randn(NUM_ITEMS, KEPT_DIM, generator=torch.Generator().manual_seed(4))
        bank.update(torch.arange(NUM_ITEMS), stale, step=0)
    branch = ContentBranch(encoders, settings, bank)
    for name, parameter in branch.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide much
            nn.init.normal_(parameter)
    return branch.train()


def parts_of(kept: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D + M * D] -> content vectors [n, D] and mean tokens [n, M, D]."""
    return kept[:, :DIM], kept[:, DIM:].unflatten(1, (NUM_MODALITIES, DIM))


def tensors(vectors: ContentVectors) -> list[Tensor]:
    parts = [getattr(vectors, part.name) for part in fields(vectors)]
    return [*(part for part in parts if part is not None), *vectors.read_history()]


def at_each_place(vectors: ContentVectors, batch: Batch) -> ContentVectors:
    """The history's vectors spread from its unique items over its places."""
    history, modalities = vectors.read_history()
    return ContentVectors(
        vectors.target,
        history[batch.history_index],
        vectors.target_modalities,
        modalities[batch.history_index],
    )


def naive_vectors(branch: ContentBranch, mode: Mode) -> ContentVectors:
    """Every occurrence encoded by itself; the bank, written first, read row by row."""
    targets = torch.cat([branch.encode(content_of(item[None])) for item in TARGETS])
    if mode == "full":
        history = torch.cat([branch.encode(content_of(item[None])) for item in HISTORY])
    else:
        assert branch.bank is not None
        rows, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
        for item, kept in zip(TARGETS.tolist(), targets.detach(), strict=True):
            rows[item] = kept
        history = torch.stack([rows[item] for item in HISTORY.tolist()])
    target, target_modalities = parts_of(targets)
    vectors, history_modalities = parts_of(history)
    mapped = torch.cat([branch.history_map(vector[None]) for vector in vectors])
    return ContentVectors(target, mapped, target_modalities, history_modalities)


@pytest.mark.parametrize("mode", ["full", "bank_lora", "bank_dense", "bank_frozen"])
def test_encoding_each_item_once_equals_encoding_every_occurrence(mode: Mode) -> None:
    branch, naive = branch_of(mode), branch_of(mode)
    expected = naive_vectors(naive, mode)
    vectors = at_each_place(branch(batch_of(mode)), batch_of(mode))
    for part, by_hand in zip(tensors(vectors), tensors(expected), strict=True):
        torch.testing.assert_close(part, by_hand, atol=1e-5, rtol=1e-5)

    for result in (vectors, expected):
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros(())
        for part in tensors(result):
            loss = loss + (torch.randn(part.shape, generator=generator) * part.square()).sum()
        loss.backward()
    parameters = dict(naive.named_parameters())
    assert sum(part.requires_grad for part in parameters.values()) > 10
    for name, parameter in branch.named_parameters():
        wanted = parameters[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("mode", "items"), [("full", [0, 1, 3, 5, 7]), ("bank_lora", [3, 5, 7])])
def test_each_encoder_runs_once_per_step_on_exactly_the_unique_items(
    mode: Mode, items: list[int]
) -> None:
    branch = branch_of(mode)
    calls: dict[str, list[Tensor]] = {"text": [], "clip": []}
    for name, encoder in branch.encoders.items():
        original: Any = encoder.encode

        def recording(
            content: ContentInput, name: str = name, original: Any = original
        ) -> ContentInput:
            calls[name].append(content.values)
            return original(content)

        encoder.encode = recording  # type: ignore[assignment]
    branch(batch_of(mode))
    for name, expected in content_of(torch.tensor(items)).items():
        (values,) = calls[name]
        assert torch.equal(values, expected.values)


def test_fresh_vectors_are_seen_in_the_histories_of_the_same_step() -> None:
    branch = branch_of("bank_frozen")
    assert branch.bank is not None
    stale, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors = at_each_place(branch(batch_of("bank_frozen")), batch_of("bank_frozen"))
    kept = torch.cat([vectors.target, vectors.target_modalities.flatten(1)], dim=1)
    fresh = dict(zip(TARGETS.tolist(), kept))
    items, modalities = vectors.read_history()
    history = torch.cat([items, modalities.flatten(1)], dim=1)
    for item, row in zip(HISTORY.tolist(), history, strict=True):
        assert torch.equal(row, fresh.get(item, stale[item]))
    rows, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    for item in range(NUM_ITEMS):
        assert torch.equal(rows[item], fresh.get(item, stale[item]))


def test_modalities_are_the_mean_projected_token_of_each_and_zero_where_there_is_none() -> None:
    branch = branch_of("full")
    content = content_of(torch.arange(NUM_ITEMS))
    vectors, modalities = parts_of(branch.encode(content))
    for index, name in enumerate(["text", "clip"]):
        encoder: Any = branch.encoders[name]
        encoded = encoder.encode(content[name])
        projected = branch.projections[name](encoded.values)
        for item in range(NUM_ITEMS):
            there = projected[item][encoded.mask[item]]
            expected = there.mean(0) if len(there) else torch.zeros(DIM)
            torch.testing.assert_close(modalities[item, index], expected, atol=1e-6, rtol=1e-5)
    assert not modalities[0].any() and vectors[0].any()


def test_without_similarities_only_content_vectors_are_kept() -> None:
    settings = ContentSettings(
        modalities={"clip": ModalitySettings(kind="feature", column="clip")},
        dim=DIM,
        history=HistorySettings(mode="bank_frozen", similarity_features=False),
    )
    bank = MemoryBank(NUM_ITEMS, settings.vector_dim, "cpu")
    branch = ContentBranch({"clip": StoredFeatures(FEATURE_DIM)}, settings, bank)
    vectors = branch(batch_of("bank_frozen"))
    assert settings.vector_dim == DIM
    assert vectors.target.shape == (len(TARGETS), DIM)
    assert vectors.target_modalities.shape == (len(TARGETS), 0, DIM)
    assert vectors.read_history()[1].shape == (len(HISTORY.unique()), 0, DIM)


def test_the_bank_learns_the_step_of_each_write() -> None:
    branch = branch_of("bank_lora")
    assert branch.bank is not None
    for _ in range(3):
        branch(batch_of("bank_lora"))
    _, steps = branch.bank.lookup(torch.tensor([3, 4]))
    assert steps.tolist() == [2, 0]
    assert branch.step == 3


def test_eval_mode_writes_nothing_and_reads_the_bank() -> None:
    branch = branch_of("bank_frozen").eval()
    assert branch.bank is not None
    before, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors = branch(batch_of("bank_frozen"))
    after, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    assert torch.equal(before, after)
    assert torch.equal(vectors.read_history()[0], before[HISTORY.unique(), :DIM])
    assert branch.step == 0


@pytest.mark.parametrize(
    ("mode", "trained"),
    [("bank_frozen", []), ("bank_lora", ["lora_A", "lora_B"]), ("bank_dense", ["map.weight"])],
)
def test_history_from_the_bank_carries_gradient_to_its_map_alone(
    mode: Mode, trained: list[str]
) -> None:
    branch = branch_of(mode)
    vectors = branch(batch_of(mode))
    history, modalities = vectors.read_history()
    assert not modalities.requires_grad
    assert history.requires_grad == bool(trained)
    if trained:
        history.square().sum().backward()
    reached = [name for name, part in branch.named_parameters() if part.grad is not None]
    assert len(reached) == len(trained)
    for name, wanted in zip(reached, trained):
        assert name.startswith("history_map.") and wanted in name


def test_the_bank_is_no_part_of_the_branch_s_weights() -> None:
    names = set(branch_of("bank_frozen").state_dict())
    assert names == set(branch_of("full").state_dict())
    assert not any("bank" in name for name in names)


@pytest.mark.parametrize("mode", ["full", "bank_lora"])
def test_the_history_is_read_once_and_only_when_it_is_asked_for(mode: Mode) -> None:
    branch = branch_of(mode)
    mapped: list[Tensor] = []
    branch.history_map.register_forward_hook(lambda part, inputs, output: mapped.append(output))
    vectors = branch(batch_of(mode))
    assert not mapped and not hasattr(vectors, "history")
    history, modalities = vectors.read_history()
    assert vectors.read_history() == (history, modalities)
    assert len(mapped) == 1 and history is mapped[0]
