"""Encoders that run for a share of the items, beside running or reading each by itself."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.config import ContentSettings, ModalitySettings
from recsys.content import encoder_outputs
from recsys.content.branch import ContentBranch
from recsys.content.encoder_outputs import EncoderOutputs, sample_indices
from recsys.content.encoders.base import Encoder
from recsys.data.batch import ContentInput
from tests.recsys.content.tiny_branch import (
    DIM,
    NUM_ITEMS,
    TARGETS,
    batch_of,
    branch_of,
    content_of,
)

WIDTH = 32  # of the text encoder's outputs


def branch_with(share: float) -> ContentBranch:
    """A branch whose stored outputs are random."""
    branch = branch_of("bank_lora")
    text: Any = branch.encoders["text"]
    outputs = MemoryBank(NUM_ITEMS, WIDTH, "cpu")
    rows = torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(9))
    outputs.update(torch.arange(NUM_ITEMS), rows, step=0)
    branch.outputs = EncoderOutputs({"text": text}, share, outputs)
    return branch


def gradients(branch: ContentBranch, vectors: Tensor) -> dict[str, Tensor | None]:
    factor = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (factor * vectors.square()).sum().backward()
    return {name: weight.grad for name, weight in branch.named_parameters()}


def assert_equal_runs(
    branch: ContentBranch, vectors: Tensor, plain: ContentBranch, expected: Tensor
) -> None:
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    actual, slow = gradients(branch, vectors), gradients(plain, expected)
    assert sum(gradient is not None for gradient in slow.values()) > 10
    for name, gradient in slow.items():
        assert (actual[name] is None) == (gradient is None), name
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_share_of_one_is_the_branch_that_encodes_each_item() -> None:
    branch, plain = branch_with(1.0), branch_of("bank_lora")
    plain.encoders["text"].eval()  # no dropout
    vectors = branch(batch_of("bank_lora")).target
    assert_equal_runs(branch, vectors, plain, plain(batch_of("bank_lora")).target)


def test_chosen_items_are_encoded_and_the_others_have_their_stored_outputs() -> None:
    branch, plain = branch_with(0.3), branch_with(0.3)
    branch.step = 8
    assert branch.outputs is not None and plain.outputs is not None
    stored, _ = plain.outputs.bank.lookup(torch.arange(NUM_ITEMS))
    unique = TARGETS.unique()
    (index,) = sample_indices(unique, 1, 8).tolist()
    sampled_item = int(unique[index])

    vectors = branch(batch_of("bank_lora")).target
    rows = []
    for item in TARGETS.tolist():
        content = content_of(torch.tensor([item]))
        stored_content = ContentInput(stored[item].view(1, 1, -1), content["text"].mask[:, :1])
        tokens = plain.outputs.encode(content) if item == sampled_item else {"text": stored_content}
        rows.append(plain.encode(content, tokens)[0, :DIM])
    assert_equal_runs(branch, vectors, plain, torch.stack(rows))

    stored_after, steps = branch.outputs.bank.lookup(torch.arange(NUM_ITEMS))
    encoded = plain.outputs.encode(content_of(torch.tensor([sampled_item])))["text"].values[0, 0]
    torch.testing.assert_close(stored_after[sampled_item], encoded, atol=1e-5, rtol=1e-5)
    is_other = torch.arange(NUM_ITEMS) != sampled_item
    assert torch.equal(stored_after[is_other], stored[is_other])
    assert steps.tolist() == [8 if item == sampled_item else 0 for item in range(NUM_ITEMS)]


def test_places_chosen_ahead_of_the_step_are_those_that_the_step_would_choose() -> None:
    ahead, plain, batch = branch_with(0.3), branch_with(0.3), batch_of("bank_lora")
    ahead.step = plain.step = 8
    assert ahead.outputs is not None
    encoded = ahead.outputs.choose(batch.content.items, 8)()
    assert torch.equal(encoded.positions, sample_indices(batch.content.items, 1, 8))
    with_indices = replace(batch, content=replace(batch.content, encoded=encoded))
    with patch.object(encoder_outputs, "sample_indices", side_effect=AssertionError):
        vectors = ahead(with_indices).target
    assert_equal_runs(ahead, vectors, plain, plain(batch).target)


def test_without_training_every_item_is_encoded() -> None:
    branch, plain = branch_with(0.3).eval(), branch_of("bank_lora").eval()
    vectors = branch(batch_of("bank_lora")).target
    assert torch.equal(vectors, plain(batch_of("bank_lora")).target)


def test_every_item_has_its_turn_by_step_alone() -> None:
    items, counts = torch.arange(100), torch.zeros(100)
    for step in range(200):
        sampled_item = sample_indices(items, 20, step)
        assert torch.equal(sampled_item, sample_indices(items, 20, step))
        counts[sampled_item] += 1
    assert counts.sum() == 4000 and counts.min() > 15 and counts.max() < 65


def settings_of(**text: Any) -> ContentSettings:
    modality = ModalitySettings("text", "text", "random:bert", **{"training": "lora", **text})
    return ContentSettings({"text": modality}, encoder_share=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of(training="frozen"), r"encoder_share is 0\.1.*training: lora"),
        (settings_of(pooling="none"), r"encoder_share is 0\.1.*modalities\.text has pooling none"),
        (settings_of(max_images=2), r"modalities\.text .* max_images 2"),
    ],
)
def test_settings_without_one_output_per_item_are_refused(
    settings: ContentSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check("content")


def test_a_trained_module_of_several_tokens_is_refused() -> None:
    poster = ModalitySettings("image", "poster", module="my:Patches", training="full")
    settings = ContentSettings({"poster": poster}, encoder_share=0.1)
    encoder = Encoder.__new__(Encoder)
    torch.nn.Module.__init__(encoder)
    encoder.frozen_tokens = 6
    with pytest.raises(ValueError, match=r"encoder_share is 0\.1.*modalities\.poster.* 6 tokens"):
        EncoderOutputs.from_settings(MemoryBank(4, 8, "cpu"), settings, {"poster": encoder})
