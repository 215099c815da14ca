"""Encoders that run for a share of the items, against running or reading each by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings import MemoryBank
from recsys.config import ContentSettings, ModalitySettings, SamplingSettings
from recsys.content.branch import ContentBranch
from recsys.content.cache.kept_outputs import EncoderOutputs, oldest
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.build import ModuleEncoder
from recsys.content.encoders.efficientnet import EfficientNetPatches
from tests.recsys.content.test_tokens import FakeNetwork
from tests.recsys.content.tiny_branch import (
    DIM,
    NUM_ITEMS,
    TARGETS,
    batch_of,
    branch_of,
    content_of,
)

WIDTH = 32  # of the text encoder's outputs


def branch_with(share: float, written: Tensor | None = None) -> ContentBranch:
    """A branch whose kept outputs are random, written in the given steps [NUM_ITEMS]."""
    branch = branch_of("bank_lora")
    text: Any = branch.encoders["text"]
    outputs = MemoryBank(NUM_ITEMS, WIDTH, "cpu")
    rows = torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(9))
    for item, step in enumerate([0] * NUM_ITEMS if written is None else written.tolist()):
        outputs.update(torch.tensor([item]), rows[item : item + 1], step)
    branch.outputs = EncoderOutputs({"text": text}, share, outputs)
    return branch


def gradients(branch: ContentBranch, vectors: Tensor) -> dict[str, Tensor | None]:
    factor = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (factor * vectors.square()).sum().backward()
    return {name: part.grad for name, part in branch.named_parameters()}


def assert_equal_runs(branch: ContentBranch, vectors: Tensor, expected: Any) -> None:
    plain, wanted = expected
    torch.testing.assert_close(vectors, wanted, atol=1e-5, rtol=1e-5)
    found, slow = gradients(branch, vectors), gradients(plain, wanted)
    assert sum(gradient is not None for gradient in slow.values()) > 10
    for name, gradient in slow.items():
        assert (found[name] is None) == (gradient is None), name
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_share_of_one_is_the_branch_that_encodes_each_item() -> None:
    branch, plain = branch_with(1.0), branch_of("bank_lora")
    vectors = branch(batch_of("bank_lora")).target
    assert_equal_runs(branch, vectors, (plain, plain(batch_of("bank_lora")).target))


def test_the_oldest_items_are_encoded_and_the_others_keep_their_outputs() -> None:
    written = torch.tensor([0, 0, 0, 5, 0, 6, 0, 2])  # of the targets 3, 5, 7 the last is oldest
    branch, plain = branch_with(0.3, written), branch_with(0.3, written)
    branch.step = 8
    assert branch.outputs is not None and plain.outputs is not None
    kept, _ = plain.outputs.bank.lookup(torch.arange(NUM_ITEMS))

    vectors = branch(batch_of("bank_lora")).target
    rows = []
    for item in TARGETS.tolist():
        content = content_of(torch.tensor([item]))
        tokens = plain.tokens(content)
        if item != 7:
            tokens["text"] = replace(
                tokens["text"], values=kept[item].view(1, 1, -1), mask=content["text"].mask[:, :1]
            )
        rows.append(plain.fuse(tokens)[0, :DIM])
    assert_equal_runs(branch, vectors, (plain, torch.stack(rows)))

    now, steps = branch.outputs.bank.lookup(torch.arange(NUM_ITEMS))
    encoded = plain.tokens(content_of(torch.tensor([7])))["text"].values[0, 0]
    torch.testing.assert_close(now[7], encoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(now[:7], kept[:7])
    assert steps.tolist() == [0, 0, 0, 5, 0, 6, 0, 8]


def test_without_training_every_item_is_encoded() -> None:
    branch, plain = branch_with(0.3).eval(), branch_of("bank_lora").eval()
    vectors = branch(batch_of("bank_lora")).target
    assert torch.equal(vectors, plain(batch_of("bank_lora")).target)


def test_items_of_equal_age_take_turns_by_step_alone() -> None:
    ids, written = torch.arange(100), torch.zeros(100, dtype=torch.long)
    counts = torch.zeros(100)
    for step in range(200):
        chosen = oldest(ids, written, 20, step)
        assert torch.equal(chosen, oldest(ids, written, 20, step))
        counts[chosen] += 1
    assert counts.sum() == 4000 and counts.min() > 10 and counts.max() < 90


def settings_of(encoders: float = 0.1, backward: float = 1.0, **text: Any) -> ContentSettings:
    modality = ModalitySettings("text", "text", "random:bert", **{"training": "lora", **text})
    sampling = SamplingSettings(encoders=encoders, backward=backward)
    return ContentSettings({"text": modality}, sampling=sampling)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (settings_of(training="frozen"), r"encoders is 0\.1.*training: lora"),
        (settings_of(pooling="none"), r"encoders is 0\.1.*modalities\.text has pooling none"),
        (settings_of(max_images=2), r"modalities\.text .* max_images 2"),
    ],
)
def test_settings_that_keep_no_output_per_item_are_refused(
    settings: ContentSettings, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        settings.check("content")


@pytest.mark.parametrize(("encoders", "backward"), [(0.0, 1.0), (1.5, 1.0), (0.5, 0.5)])
def test_shares_that_do_not_fit_are_refused(encoders: float, backward: float) -> None:
    with pytest.raises(ValueError, match=rf"encoders is {encoders}.*backward {backward}"):
        SamplingSettings(encoders=encoders, backward=backward).check("sampling")


def test_a_trained_module_of_several_tokens_is_refused() -> None:
    poster = ModalitySettings("image", "poster", module="my:Patches", training="full")
    settings = ContentSettings({"poster": poster}, sampling=SamplingSettings(encoders=0.1))
    encoders: dict[str, Encoder] = {
        "poster": ModuleEncoder(EfficientNetPatches(FakeNetwork()), True, 64)
    }
    with pytest.raises(ValueError, match=r"encoders is 0\.1.*modalities\.poster.* 6;"):
        EncoderOutputs.beside(MemoryBank(4, 8, "cpu"), settings, encoders)
