"""Encoders are found where the setting says, or the setting is named with what is wrong."""

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recsys.content.encoders.preparation import load_tokenizer
from recsys.content.encoders.pretrained import load_module, load_transformer, resolve_encoder
from recsys.content.encoders.tiny_encoders import tiny_model, tiny_tokenizer

WHERE = "content.modalities.text"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment variable is read at import only.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    tiny_model("random:bert", WHERE).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a test may put packages and modules."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_folder_is_loaded_with_its_weights_and_without_dropout(encoder_folder: Path) -> None:
    model = load_transformer(str(encoder_folder), None, WHERE).train()
    expected = tiny_model("random:bert", WHERE).eval()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
    ids = torch.arange(5, 11)[None]
    torch.testing.assert_close(model(ids).last_hidden_state, expected(ids).last_hidden_state)
    tokenizer = load_tokenizer(str(encoder_folder), None, WHERE)
    assert tokenizer("Ab c")["input_ids"] == tiny_tokenizer()("Ab c")["input_ids"]


def test_dropout_of_a_checkpoint_is_switched_off(tmp_path: Path) -> None:
    model = tiny_model("random:bert", WHERE)
    model.config.hidden_dropout_prob = 0.5  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_transformer(str(tmp_path), None, WHERE)
    dropouts = [part.p for part in loaded.modules() if isinstance(part, nn.Dropout)]
    assert dropouts and not any(dropouts)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{WHERE}: encoder folder '{tmp_path}/none' has no conf"):
        load_transformer(f"{tmp_path}/none", None, WHERE)
    with pytest.raises(ValueError, match=rf"{WHERE}: encoder folder './none' has no config.json"):
        load_tokenizer("./none", None, WHERE)


@pytest.mark.parametrize(
    "package", ["no_such_package", "no_such_package.inner", "", "json.decoder"]
)
def test_a_missing_package_is_named_with_its_installation(package: str) -> None:
    with pytest.raises(ValueError, match=f"{WHERE}: encoder package '{package}' is not installed"):
        resolve_encoder(f"package:{package}", WHERE)


def test_a_package_resolves_to_the_outermost_folder_with_a_config(importable: Path) -> None:
    inner = importable / "some_weights" / "model"
    (inner / "older").mkdir(parents=True)
    (importable / "some_weights" / "__init__.py").touch()
    with pytest.raises(ValueError, match="'some_weights' holds no folder with a config"):
        resolve_encoder("package:some_weights", WHERE)
    (inner / "older" / "config.json").write_text("{}")
    (inner / "config.json").write_text("{}")
    assert resolve_encoder("package:some_weights", WHERE) == str(inner)


def test_a_hub_name_is_left_to_transformers() -> None:
    assert resolve_encoder("someone/some-model", WHERE) == "someone/some-model"


def test_a_hub_name_that_cannot_be_fetched_is_named() -> None:
    with pytest.raises(ValueError, match=f"{WHERE}: encoder 'nobody/nothing' cannot be loaded"):
        load_transformer("nobody/nothing", None, WHERE)
    with pytest.raises(ValueError, match=f"{WHERE}: tokenizer of 'nobody/nothing' cannot be load"):
        load_tokenizer("nobody/nothing", None, WHERE)


def test_an_unknown_random_encoder_is_named() -> None:
    with pytest.raises(ValueError, match=f"{WHERE}: encoder 'random:gpt' is unknown; choose"):
        load_transformer("random:gpt", None, WHERE)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no_such_type"}'])
def test_a_damaged_config_is_named(encoder_folder: Path, config: str) -> None:
    (encoder_folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"{WHERE}: encoder '{encoder_folder}' cannot be loaded"):
        load_transformer(str(encoder_folder), None, WHERE)


def test_missing_and_damaged_weights_are_named(encoder_folder: Path) -> None:
    weights = encoder_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{WHERE}: encoder '{encoder_folder}' cannot be loaded"):
        load_transformer(str(encoder_folder), None, WHERE)
    weights.unlink()
    with pytest.raises(ValueError, match=f"{WHERE}: encoder '{encoder_folder}' cannot be loaded"):
        load_transformer(str(encoder_folder), None, WHERE)


def test_a_checkpoint_without_some_weights_is_refused_rather_than_left_random(
    encoder_folder: Path,
) -> None:
    file = encoder_folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{encoder_folder}' lacks the weights \['{name}'\]"):
        load_transformer(str(encoder_folder), None, WHERE)


def test_weights_of_another_size_are_refused(encoder_folder: Path) -> None:
    config = encoder_folder / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48')
    )
    with pytest.raises(ValueError, match=f"{WHERE}: encoder '{encoder_folder}'"):
        load_transformer(str(encoder_folder), None, WHERE)


def test_a_module_comes_from_its_factory(importable: Path) -> None:
    (importable / "module_factories.py").write_text(
        "from torch import nn\n\ndef good():\n    return nn.Linear(2, 3)\n"
    )
    module = load_module("module_factories:good", WHERE)
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (3, 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:make", "cannot be made .*no_such_module"),
        ("bad_factories:absent", "cannot be made .*absent"),
        ("bad_factories:needs_argument", "cannot be made .*argument"),
        ("bad_factories:fails", "cannot be made .*weights are gone"),
        ("bad_factories:number", "returned int, not a torch module"),
        ("bad_factories", "is not of the form package.module:factory"),
        (":number", "is not of the form package.module:factory"),
        ("bad_factories:", "is not of the form package.module:factory"),
    ],
)
def test_a_factory_that_gives_no_module_is_named(importable: Path, path: str, message: str) -> None:
    sys.modules.pop("bad_factories", None)
    (importable / "bad_factories.py").write_text(
        "def needs_argument(size):\n    return size\n\n"
        "def fails():\n    raise RuntimeError('weights are gone')\n\n"
        "def number():\n    return 3\n"
    )
    with pytest.raises(ValueError, match=f"{WHERE}: .*'{path}' {message}"):
        load_module(path, WHERE)
