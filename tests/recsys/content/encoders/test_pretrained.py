"""Encoders are found where the setting says, or the setting is named with what is wrong."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from recsys.content.encoders.pretrained import PretrainedEncoder, tiny_model, tiny_tokenizer

WHERE = "content.modalities.text"


def test_a_package_resolves_to_the_outermost_folder_with_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "some_weights" / "model"
    (inner / "older").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"'some_weights' .*config"):
        PretrainedEncoder("package:some_weights", None, WHERE)
    (inner / "older" / "config.json").write_text("{}")
    (inner / "config.json").write_text("{}")
    assert PretrainedEncoder("package:some_weights", None, WHERE).source == str(inner)


def test_a_checkpoint_without_some_weights_is_refused_rather_than_left_random(
    tmp_path: Path,
) -> None:
    tiny_model("random:bert", WHERE).save_pretrained(tmp_path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{tmp_path}' .*\['{name}'\]"):
        PretrainedEncoder(str(tmp_path), None, WHERE).load_model()
