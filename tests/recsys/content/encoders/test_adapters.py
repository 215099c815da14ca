"""LoRA by configuration against its formulas, and settings that are refused."""

from functools import partial
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.image_encoders import ImageTransformer
from recsys.content.encoders.pretrained import tiny_model
from recsys.content.encoders.text_transformer import TextTransformer
from recsys.content.encoders.transformer import TransformerEncoder
from tests.recsys.content.encoders.tiny_transformers import CONFIGS, content_of, input_size

BERT: Any = tiny_model("random:bert", "")
NUM_LAYERS = 3


def encoder_of(**lora: Any) -> TransformerEncoder:
    modality = ModalitySettings(
        kind="text",
        column="content",
        encoder="random:bert",
        training="lora",
        pooling="none",
        lora=LoraSettings(**{"rank": 4, "alpha": 6.0, "top_layers": NUM_LAYERS} | lora),
        max_length=8,
    )
    torch.manual_seed(0)
    encoder = build_encoder("it", modality, None)
    assert isinstance(encoder, TransformerEncoder)
    return encoder


def randomized(encoder: TransformerEncoder) -> TransformerEncoder:
    """With adapters and magnitudes that are no longer those of the start."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.1, 0.6)
    return encoder


def adapted(encoder: TransformerEncoder) -> dict[str, Any]:
    return {
        name: layer for name, layer in encoder.model.named_modules() if hasattr(layer, "base_layer")
    }


def assert_equals_bert_with(encoder: TransformerEncoder, weights: dict[str, Tensor]) -> None:
    """The same as the plain model with these weights in place of its own."""
    plain: Any = tiny_model("random:bert", "").eval()
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    content = content_of("bert")
    ids = content.values[0][content.mask[0]]
    expected = plain(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(content).values[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_and_dora_are_their_formulas(use_dora: bool) -> None:
    encoder = randomized(encoder_of(use_dora=use_dora))
    weights = {}
    for name, module in adapted(encoder).items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        weight = module.base_layer.weight + 6.0 / 4 * b @ a
        if use_dora:
            magnitude = module.lora_magnitude_vector["default"].weight
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        weights[name] = weight.detach()
    assert len(weights) == 2 * NUM_LAYERS
    assert_equals_bert_with(encoder, weights)


@pytest.mark.parametrize("use_dora", [False, True])
def test_new_adapters_leave_the_model_as_it_was(use_dora: bool) -> None:
    assert_equals_bert_with(encoder_of(use_dora=use_dora), {})


@pytest.mark.parametrize(("layers", "indices"), [([1, 1], {"1"}), ([0, 1], {"0", "1"})])
def test_a_range_of_layers_is_adapted_and_those_above_run_as_they_are(
    layers: list[int], indices: set[str]
) -> None:
    encoder = randomized(encoder_of(layers=layers))
    assert {name.split(".")[2] for name in adapted(encoder)} == indices
    assert encoder.first_trained == layers[0]
    weights = {
        name: (module.base_layer.weight + 6.0 / 4 * module.lora_B["default"].weight
               @ module.lora_A["default"].weight).detach()
        for name, module in adapted(encoder).items()
    }  # fmt: skip
    assert_equals_bert_with(encoder, weights)
    expected, cached = (
        encoder.encode(content_of("bert")),
        encoder.frozen_outputs(content_of("bert")),
    )
    encoder.drop_frozen_layers()  # below the lowest adapted one
    empty = [int(name.split(".")[3]) for name, weight in encoder.named_parameters()
             if ".layer." in name and not weight.numel()]  # fmt: skip
    assert set(empty) == set(range(layers[0]))
    assert torch.equal(encoder.encode(cached).values, expected.values)


def note(saved: list[bool], is_on: bool, tensor: Tensor) -> Tensor:
    saved.append(is_on)
    return tensor


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("name", ["bert", "clip_text"])
def test_activation_checkpointing_gives_the_same_gradients_with_dropout_too(
    training: Any, name: str
) -> None:
    gradients, saved = [], list[bool]()
    for is_on in (False, True):
        modality = ModalitySettings(
            kind="text",
            column="content",
            encoder="random:bert" if name == "bert" else "random:clip",
            training=training,
            lora=LoraSettings(
                rank=2,
                dropout=0.5,
                top_layers=2,
                targets=["query", "value"] if name == "bert" else ["q_proj", "v_proj"],
            ),
            max_length=8,
            activation_checkpointing=is_on,
        )
        torch.manual_seed(0)
        encoder = build_encoder("it", modality, None).train()
        randomized(encoder)  # type: ignore[arg-type]
        with saved_tensors_hooks(partial(note, saved, is_on), lambda tensor: tensor):
            output = encoder.encode(content_of("bert"))
        output.values.square().sum().backward()
        gradients.append(
            {key: weight.grad for key, weight in encoder.named_parameters() if weight.requires_grad}
        )
    assert saved.count(True) < saved.count(False) / 2  # activations are computed again
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradients[1][key], gradient), key


def modality_of(kind: Literal["text", "image"], **settings: Any) -> ModalitySettings:
    return ModalitySettings(kind=kind, column="c", **input_size(kind), **settings)


def transformer(name: str, modality: ModalitySettings) -> TransformerEncoder:
    model = transformers.AutoModel.from_config(CONFIGS[name])
    kind = TextTransformer if modality.kind == "text" else ImageTransformer
    return kind(model, modality, "content.modalities.it")


def test_lora_targets_that_fit_nothing_are_named_with_what_would() -> None:
    modality = modality_of("image", training="lora", lora=LoraSettings(targets=["q_proj", "query"]))
    with pytest.raises(ValueError, match=r"it\.lora\.targets: 'query' .*attention\.q_proj"):
        transformer("vit", modality)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 3]}, r"lora\.layers is \[1, 3\]; .*0 to 2"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    modality = modality_of("text", training="lora", lora=LoraSettings(**settings))
    with pytest.raises(ValueError, match=message):
        transformer("bert", modality)


def test_texts_of_siglip_are_as_long_as_it_was_trained_on() -> None:
    tower = transformers.AutoModel.from_config(CONFIGS["siglip_text"]).text_model
    TextTransformer(tower, modality_of("text"), "it")
    modality = ModalitySettings(kind="text", column="c", max_length=7)
    with pytest.raises(ValueError, match=r"max_length is 7; .* 8"):
        TextTransformer(tower, modality, "it")


@pytest.mark.parametrize(("name", "limit"), [("bert", 512), ("roberta", 10)])
def test_texts_longer_than_the_position_embeddings_are_refused(name: str, limit: int) -> None:
    modality = ModalitySettings(kind="text", column="c", max_length=limit)
    transformer(name, modality)
    modality.max_length = limit + 1
    with pytest.raises(ValueError, match=rf"max_length is {limit + 1}; .* {limit} "):
        transformer(name, modality)
