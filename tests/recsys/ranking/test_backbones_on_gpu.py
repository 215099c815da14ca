"""Every backbone computes on the device of its inputs: no tensor is made on another one."""

from __future__ import annotations

import pytest
import torch

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.kernels.choice import _KernelChoice
from tests.fake_gpu import fake_gpu, on_fake_gpu
from tests.recsys.ranking.ranking_inputs import CONTENT, inputs
from tests.recsys.ranking.test_backbones import by_backbone, logits_of, model_of


@pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])
@by_backbone
def test_logits_of_a_batch_on_a_gpu_are_on_that_gpu(
    name: str, content: ContentSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    model, (ids, vectors, batch) = model_of(name, content), inputs()
    history = vectors.read_history()
    read = [vectors.target, history[0], vectors.target_modalities, history[1]]
    with fake_gpu():
        given = None if content is None else ContentVectors(*on_fake_gpu(read))
        on_fake_gpu(batch.sequence_features)
        logits = logits_of(on_fake_gpu(model), on_fake_gpu(ids), given, on_fake_gpu(batch))
        assert logits.shape == (3, 1) and logits.device.type == "cuda"


def test_a_tensor_on_another_device_is_found() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        on_fake_gpu(torch.ones(3)) + torch.arange(3)
