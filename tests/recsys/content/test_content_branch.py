"""The content branch: encoding unique items once against encoding every occurrence naively."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.config import (
    ContentSettings,
    ModalitySettings,
)
from recsys.content.batch_preparation import with_negatives
from recsys.content.branch import ContentBranch
from recsys.content.encoders.build import StoredFeatures
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch, ContentInput
from tests.recsys.content.tiny_branch import (
    DIM,
    HISTORY,
    NUM_ITEMS,
    NUM_MODALITIES,
    TARGETS,
    Mode,
    batch_of,
    branch_of,
    content_of,
)


def split_row(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D + M * D] -> content vectors [n, D] and mean tokens [n, M, D]."""
    return rows[:, :DIM], rows[:, DIM:].unflatten(1, (NUM_MODALITIES, DIM))


def tensors(vectors: ContentVectors) -> list[Tensor]:
    values = [getattr(vectors, item.name) for item in fields(vectors)]
    return [*(tensor for tensor in values if tensor is not None), *vectors.read_history()]


def for_each_event(vectors: ContentVectors, batch: Batch) -> ContentVectors:
    """The history's vectors spread from its unique items over its events."""
    history, modalities = vectors.read_history()
    return ContentVectors(
        vectors.target,
        history[batch.history.index],
        vectors.target_modalities,
        modalities[batch.history.index],
    )


def naive_vectors(branch: ContentBranch, mode: Mode) -> ContentVectors:
    """Every occurrence encoded by itself; the bank, written first, read row by row."""
    targets = torch.cat([branch.encode(content_of(item[None])) for item in TARGETS])
    if mode == "full":
        history = torch.cat([branch.encode(content_of(item[None])) for item in HISTORY])
    else:
        assert branch.bank is not None
        rows, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
        for item, vector in zip(TARGETS.tolist(), targets.detach(), strict=True):
            rows[item] = vector
        history = torch.stack([rows[item] for item in HISTORY.tolist()])
    target, target_modalities = split_row(targets)
    vectors, history_modalities = split_row(history)
    mapped = torch.cat([branch.history_map(vector[None]) for vector in vectors])
    return ContentVectors(target, mapped, target_modalities, history_modalities)


NEGATIVES = torch.tensor([5, 0, 1, 5])  # item 5 is a target, too


@pytest.mark.parametrize("mode", ["full", "bank_lora"])
def test_drawn_negatives_are_encoded_as_targets_are_whatever_the_bank_has(mode: Mode) -> None:
    branch, batch = branch_of(mode), batch_of(mode)
    content = with_negatives(batch.content, NEGATIVES)
    content = replace(content, inputs=content_of(content.items))
    vectors = branch(replace(batch, content=content))
    target, modalities = split_row(branch.encode(content_of(NEGATIVES)))
    assert vectors.negatives is not None and vectors.negative_modalities is not None
    torch.testing.assert_close(vectors.negatives, target)
    torch.testing.assert_close(vectors.negative_modalities, modalities)
    assert torch.equal(vectors.negatives[0], vectors.target[TARGETS.tolist().index(5)])
    assert vectors.negatives.requires_grad
    plain = branch_of(mode)(batch)
    for tensor, other in zip(tensors(plain)[:2], (vectors.target, vectors.target_modalities)):
        torch.testing.assert_close(tensor, other)
    if branch.bank is not None:  # it has them for the histories of this step
        read = branch.bank.lookup(NEGATIVES)[0]
        torch.testing.assert_close(read[:, :DIM], vectors.negatives)


@pytest.mark.parametrize("mode", ["full", "bank_lora", "bank_dense", "bank_frozen"])
def test_encoding_each_item_once_equals_encoding_every_occurrence(mode: Mode) -> None:
    branch, naive = branch_of(mode), branch_of(mode)
    expected = naive_vectors(naive, mode)
    vectors = for_each_event(branch(batch_of(mode)), batch_of(mode))
    for tensor, by_hand in zip(tensors(vectors), tensors(expected), strict=True):
        torch.testing.assert_close(tensor, by_hand, atol=1e-5, rtol=1e-5)

    for result in (vectors, expected):
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros(())
        for tensor in tensors(result):
            loss = loss + (torch.randn(tensor.shape, generator=generator) * tensor.square()).sum()
        loss.backward()
    parameters = dict(naive.named_parameters())
    assert sum(tensor.requires_grad for tensor in parameters.values()) > 10
    for name, parameter in branch.named_parameters():
        reference = parameters[name].grad
        assert (parameter.grad is None) == (reference is None), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if reference is not None:
            torch.testing.assert_close(parameter.grad, reference, atol=1e-5, rtol=1e-4, msg=name)


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


def test_modalities_are_the_mean_projected_token_of_each_and_zero_where_there_is_none() -> None:
    branch = branch_of("full")
    content = content_of(torch.arange(NUM_ITEMS))
    vectors, modalities = split_row(branch.encode(content))
    for index, name in enumerate(["text", "clip"]):
        encoder: Any = branch.encoders[name]
        encoded = encoder.encode(content[name])
        projected = branch.projections[name](encoded.values)
        for item in range(NUM_ITEMS):
            tokens = projected[item][encoded.mask[item]]
            expected = tokens.mean(0) if len(tokens) else torch.zeros(DIM)
            torch.testing.assert_close(modalities[item, index], expected, atol=1e-6, rtol=1e-5)
    assert not modalities[0].any() and vectors[0].any()


def test_eval_mode_writes_nothing_and_reads_the_bank() -> None:
    branch = branch_of("bank_frozen").eval()
    assert branch.bank is not None
    old_vectors, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    vectors = branch(batch_of("bank_frozen"))
    new_vectors, _ = branch.bank.lookup(torch.arange(NUM_ITEMS))
    assert torch.equal(old_vectors, new_vectors)
    assert torch.equal(vectors.read_history()[0], old_vectors[HISTORY.unique(), :DIM])
    assert branch.step == 0


@pytest.mark.parametrize("name", ["items", "type", "training"])
def test_a_modality_named_as_an_attribute_of_modules_is_refused(name: str) -> None:
    settings = ContentSettings({name: ModalitySettings("feature", "clip")}, dim=4)
    with pytest.raises(ValueError, match=rf"content\.modalities\.{name}"):
        ContentBranch(
            {name: StoredFeatures(6)}, settings, MemoryBank(9, settings.vector_dim, "cpu")
        )
