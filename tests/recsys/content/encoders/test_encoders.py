"""Encoders run layer by layer against the whole transformers model, item by item, unpadded."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders import text_transformer
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from tests.recsys.content.encoders.tiny_transformers import (
    CONFIGS,
    LENGTHS,
    SIZES,
    content_of,
    input_size,
    kind_of,
    saved_models,
    tower_of,
)

Training = Literal["frozen", "lora", "full"]
Pooling = Literal["mean", "cls", "last", "none", "projected"]

MODELS = list(CONFIGS)
TARGETS = {
    name: ["query", "value"] if name in ("bert", "roberta") else ["q_proj", "v_proj"]
    for name in MODELS
}
TRAININGS: list[Training] = ["frozen", "lora", "full"]
# Tokens are pooled behind the model, alike for each kind of content.
POOLED: list[tuple[str, Pooling]] = [(name, "mean") for name in MODELS]
POOLED += [(name, pooling) for name in ("bert", "clip") for pooling in ("cls", "last", "none")]


@pytest.fixture(autouse=True)
def groups_of_two_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_transformer, "ITEMS_PER_GROUP", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(CONFIGS, tmp_path_factory, std=0.4)


def encoder_of(
    folders: dict[str, Path],
    name: str,
    training: Training,
    pooling: Pooling = "mean",
) -> TransformerEncoder:
    modality = ModalitySettings(
        kind=kind_of(name),
        column="content",
        encoder=str(folders[name]),
        training=training,
        pooling=pooling,
        lora=LoraSettings(rank=2, alpha=3.0, targets=TARGETS[name], top_layers=2),
        **input_size(kind_of(name)),
    )
    torch.manual_seed(1)
    encoder = build_encoder("it", modality, None)
    assert isinstance(encoder, TransformerEncoder)
    return encoder


def full_model(folders: dict[str, Path], name: str) -> Any:
    return transformers.AutoModel.from_pretrained(folders[name]).eval()


def tokens_by_item(full: Any, name: str, pooling: Pooling) -> dict[int, Tensor]:
    """The whole model on one item at a time without padding, pooled by hand: [T, D] by item."""
    model = tower_of(name, full)
    content, tokens = content_of(name), {}
    for item, length in enumerate(LENGTHS):
        if not length:
            continue
        if kind_of(name) == "image":
            scaled = content.values[item].float() / 255
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            pixels = (scaled - mean[:, None, None]) / std[:, None, None]
            hidden = model(pixel_values=pixels[None]).last_hidden_state[0]
        else:
            ids = content.values[item][content.mask[item]]
            hidden = model(input_ids=ids[None]).last_hidden_state[0]
        by_hand = {"mean": hidden.mean(0, keepdim=True), "cls": hidden[:1]}
        tokens[item] = {**by_hand, "last": hidden[-1:], "none": hidden}[pooling]
    return tokens


def assert_tokens(output: ContentInput, expected: dict[int, Tensor]) -> None:
    assert torch.isfinite(output.values).all()
    for item in range(len(LENGTHS)):
        tokens = output.values[item][output.mask[item]]
        reference = expected.get(item, torch.zeros(0, output.values.shape[2]))
        rounding = 0 if tokens.dtype == torch.float32 else 2**-11  # all tokens are kept in float16
        torch.testing.assert_close(tokens.float(), reference, atol=1e-5, rtol=1e-5 + rounding)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(("name", "pooling"), POOLED)
def test_frozen_and_forward_together_equal_the_whole_model(
    folders: dict[str, Path], name: str, training: Training, pooling: Pooling
) -> None:
    # In train mode: no dropout acts, though the model's configuration asks for it.
    encoder = encoder_of(folders, name, training, pooling).train()
    assert encoder.output_dim == SIZES["hidden_size"]
    assert encoder.caches == (training != "full")
    output = encoder.encode(content_of(name))
    assert_tokens(output, tokens_by_item(full_model(folders, name), name, pooling))


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_equal_texts_run_once_with_tokens_and_gradients_as_if_each_ran(
    folders: dict[str, Path],
    training: Training,
    pooling: Pooling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, content = encoder_of(folders, "bert", training, pooling), content_of("bert")
    for key, parameter in encoder.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    trained = [weight for weight in encoder.parameters() if weight.requires_grad]
    repeated = torch.tensor([0, 1, 0, 2, 2, 3, 1, 0])
    content = ContentInput(content.values[repeated], content.mask[repeated])
    run, results = encoder._run_above_cut if training == "lora" else encoder._run, []
    ran: list[int] = []

    def counted(*arguments: Tensor) -> Any:
        ran.append(len(arguments[-1]))
        return run(*arguments)

    monkeypatch.setattr(encoder, run.__name__, counted)
    for once in (True, False):
        if not once:
            all_items = torch.arange(len(repeated))
            monkeypatch.setattr(
                text_transformer,
                "distinct_items",
                lambda content, all_items=all_items: (all_items, all_items),
            )
        ran.clear()
        output = encoder(encoder.frozen_outputs(content) if training == "lora" else content)
        assert sum(ran) == (4 if once else len(repeated))
        factor = torch.randn(output.values.shape, generator=torch.Generator().manual_seed(2))
        loss = (factor * output.values)[output.mask].sum()
        results.append([output.values[output.mask], *torch.autograd.grad(loss, trained)])
    for weight, expected in zip(*results, strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_full_training_gives_the_gradients_of_the_whole_model(
    folders: dict[str, Path], name: str
) -> None:
    encoder = encoder_of(folders, name, "full")
    output = encoder.encode(content_of(name))
    output.values[output.mask].square().sum().backward()
    model = full_model(folders, name)
    tokens = tokens_by_item(model, name, "mean")
    sum(p.square().sum() for p in tokens.values()).backward()  # type: ignore[union-attr]
    parameters = tower_of(name, model).named_parameters()
    expected = {key: p.grad for key, p in parameters if p.grad is not None}
    trained = {key: p for key, p in encoder.model.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)  # not heads and the like, which no loss reaches
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "clip", "clip_text", "siglip_image"])
def test_trained_lora_equals_a_model_with_the_merged_weights(
    folders: dict[str, Path], name: str
) -> None:
    encoder = encoder_of(folders, name, "lora")
    model = full_model(folders, name)
    for key, module in encoder.model.named_modules():
        if hasattr(module, "lora_B"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                b.normal_()
                tower_of(name, model).get_submodule(key).weight += 3.0 / 2 * b @ a
    output = encoder.encode(content_of(name))
    assert_tokens(output, tokens_by_item(model, name, "mean"))


@pytest.mark.parametrize("training", ["frozen", "lora"])
@pytest.mark.parametrize(("name", "pooling"), POOLED)
def test_dropped_frozen_layers_and_kept_outputs_change_nothing(
    folders: dict[str, Path], name: str, training: Training, pooling: Pooling
) -> None:
    content = content_of(name)
    encoder = encoder_of(folders, name, training, pooling)
    expected = encoder.encode(content)
    saved = encoder.frozen_outputs(content)
    trained = {key: weight for key, weight in encoder.named_parameters() if weight.requires_grad}
    gradients = []
    if trained:
        gradients = list(torch.autograd.grad(expected.values.sum(), list(trained.values())))
    size = sum(weight.numel() for weight in encoder.parameters())
    encoder.drop_frozen_layers()
    assert sum(weight.numel() for weight in encoder.parameters()) < size
    remaining = {key: weight for key, weight in encoder.named_parameters() if weight.requires_grad}
    assert list(remaining) == list(trained)
    output = encoder.encode(saved)
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(output.values, expected.values)
    if trained:
        again = torch.autograd.grad(output.values.sum(), list(remaining.values()))
        assert all(torch.equal(*pair) for pair in zip(again, gradients, strict=True))
