"""Encoders are found where the setting says, or the setting is named with what is wrong."""

import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from recsys.config import ModalitySettings
from recsys.content.encoders.pretrained import PretrainedEncoder
from recsys.content.encoders.tiny_encoders import tiny_model, tiny_tokenizer
from recsys.data.items.kind import make_kind

WHERE = "content.modalities.text"


def module_of(path: str) -> nn.Module:
    modality = ModalitySettings("image", "poster", module=path, image_size=2)
    encoder: Any = make_kind(WHERE, modality).encoder(())
    return encoder.module


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


def test_a_package_resolves_to_the_outermost_folder_with_a_config(importable: Path) -> None:
    inner = importable / "some_weights" / "model"
    (inner / "older").mkdir(parents=True)
    (importable / "some_weights" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"'some_weights' .*config"):
        PretrainedEncoder("package:some_weights", None, WHERE)
    (inner / "older" / "config.json").write_text("{}")
    (inner / "config.json").write_text("{}")
    assert PretrainedEncoder("package:some_weights", None, WHERE).source == str(inner)


def test_a_checkpoint_without_some_weights_is_refused_rather_than_left_random(
    encoder_folder: Path,
) -> None:
    file = encoder_folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{encoder_folder}' .*\['{name}'\]"):
        PretrainedEncoder(str(encoder_folder), None, WHERE).load_model()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bad_factories:absent", "imported .*absent"),
        ("bad_factories:needs_argument", "made .*argument"),
        ("bad_factories:fails", "made .*weights are"),
        ("bad_factories:number", "int, .*Module"),
        ("bad_factories", "unknown.* package.module:Class"),
    ],
)
def test_a_factory_that_gives_no_module_is_named(importable: Path, path: str, message: str) -> None:
    sys.modules.pop("bad_factories", None)
    (importable / "bad_factories.py").write_text(
        "def needs_argument(size):\n    return size\n\n"
        "def fails():\n    raise RuntimeError('weights are gone')\n\n"
        "def number():\n    return 3\n"
    )
    with pytest.raises(ValueError, match=f"{WHERE}: .*'{path}' .*{message}"):
        module_of(path)
