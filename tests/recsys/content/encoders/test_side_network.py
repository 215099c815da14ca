"""Side tuning against its formula over the whole transformers model, item by item, unpadded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from recsys.config import ModalitySettings
from recsys.content.cache.fill import encoder_key
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from tests.recsys.content.encoders.tiny_transformers import (
    CONFIGS,
    LENGTHS,
    OTHER_CONFIGS,
    content_of,
    input_size,
    kind_of,
    saved_models,
    tower_of,
)

OTHER_SEEDS = {name: config for name, (config, _, _) in OTHER_CONFIGS.items()}
WITHOUT = ["swin", "convnext"]  # whose states have several widths
MODELS = [name for name in (*CONFIGS, *OTHER_SEEDS) if name not in WITHOUT]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models({**CONFIGS, **OTHER_SEEDS}, tmp_path_factory, std=0.4)


def modality_of(path: str, name: str, **settings: Any) -> ModalitySettings:
    return ModalitySettings(
        **{
            "kind": kind_of(name),
            "column": "content",
            "encoder": path,
            "training": "side",
            "side_width": 5,
            **input_size(kind_of(name)),
            **settings,
        }
    )


def encoder_of(encoder: str, name: str, seed: int = 0, **settings: Any) -> TransformerEncoder:
    torch.manual_seed(seed)
    built = build_encoder("it", modality_of(encoder, name, **settings))
    assert isinstance(built, TransformerEncoder) and built.side is not None
    for parameter in built.side.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built.train()


def states_of(model: Any, name: str, item: int) -> list[Tensor]:  # [T, D] each
    """States of one item alone, from the embeddings to the model's last output."""
    content = content_of(name)
    if kind_of(name) == "image":
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (content.values[item].float() / 255 - mean[:, None, None]) / std[:, None, None]
        output = model(pixel_values=pixels[None], output_hidden_states=True)
    else:
        ids = content.values[item][content.mask[item]]
        output = model(input_ids=ids[None], output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return [state[0].detach() for state in states]


def by_hand(states: list[Tensor], weights: dict[str, Tensor]) -> Tensor:  # [D]
    ladder = torch.zeros(5)
    for index, state in enumerate(states):
        rung = state @ weights[f"down.{index}.weight"].T + weights[f"down.{index}.bias"]
        if index:
            rung = rung + weights[f"across.{index - 1}.weight"] @ ladder
        ladder = rung * 0.5 * (1 + torch.erf(rung / 2**0.5))
    return states[-1] + weights["up.weight"] @ ladder


def full_model(folder: Path, name: str) -> Any:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model.encoder if name == "t5" else tower_of(name, model)


def pooled(state: Tensor, pooling: str) -> Tensor:  # [T, D] -> [D]
    token = {"mean": state.mean(0), "cls": state[0], "last": state[-1]}[pooling]
    return token.half().float()  # as the cache keeps it


@pytest.mark.parametrize(
    ("name", "pooling"), [*((name, "mean") for name in MODELS), ("bert", "cls"), ("qwen3", "last")]
)
def test_outputs_and_gradients_are_those_of_the_formula(
    folders: dict[str, Path], name: str, pooling: str
) -> None:
    encoder, content = encoder_of(str(folders[name]), name, pooling=pooling), content_of(name)
    side: Any = encoder.side
    weights = {key: p.detach().clone().requires_grad_() for key, p in side.named_parameters()}
    model, output = full_model(folders[name], name), encoder.encode(content)
    assert output.mask.tolist() == [[length > 0] for length in LENGTHS]
    items = [item for item, length in enumerate(LENGTHS) if length]
    expected = torch.stack(
        [
            by_hand([pooled(state, pooling) for state in states_of(model, name, item)], weights)
            for item in items
        ]
    )
    # A state may be rounded to the neighbouring value in float16.
    torch.testing.assert_close(output.values[items, 0], expected, atol=5e-3, rtol=5e-3)

    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    for result in (output.values[items, 0], expected):
        (factor * result).sum().backward()
    trained = {key for key, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {f"side.{key}" for key in weights}
    for key, p in side.named_parameters():
        torch.testing.assert_close(p.grad, weights[key].grad, atol=2e-2, rtol=1e-2, msg=key)


def test_a_batch_without_any_content_has_no_token() -> None:
    encoder = encoder_of("random:bert", "bert")
    empty = ContentInput(torch.zeros(3, 1, encoder.output_dim), torch.zeros(3, 1).bool())
    output = encoder(empty)
    assert output.values.shape == (3, 1, encoder.output_dim) and not output.mask.any()


def test_the_start_is_the_frozen_encoder_and_one_cache_serves_all_seeds() -> None:
    torch.manual_seed(0)
    start = build_encoder("it", modality_of("random:bert", "bert"))
    frozen = build_encoder("it", modality_of("random:bert", "bert", training="frozen"))
    content = content_of("bert")
    tokens = [encoder.encode(content).values for encoder in (start, frozen)]
    torch.testing.assert_close(*tokens, atol=2e-3, rtol=1e-3)  # states are kept in float16
    encoders = [encoder_of("random:bert", "bert", seed=seed) for seed in (1, 2)]
    assert {encoder_key(encoder) for encoder in (start, *encoders)} == {encoder_key(start)}
    assert encoder_key(start) != encoder_key(frozen)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_with_states_of_several_widths_is_refused(
    folders: dict[str, Path], name: str
) -> None:
    with pytest.raises(ValueError, match="hidden states of all layers, of one width"):
        encoder_of(str(folders[name]), name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "none"}, "one vector per layer.*mean, cls or last"),
        ({"activation_checkpointing": True}, "activation_checkpointing is for the trained layers"),
        (
            {"kind": "image", "encoder": None, "module": "b:c", "max_length": 32},
            "side needs a transformers",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modality_of("random:bert", "bert", **settings).check("content.modalities.it")
