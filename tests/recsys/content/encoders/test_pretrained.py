"""Encoders are found where the setting says, or the setting is named with what is wrong."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from recsys.content.encoders.pretrained import PretrainedEncoder
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
