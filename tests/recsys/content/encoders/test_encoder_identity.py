"""A run keeps which encoders it was trained with, and refuses others.

The hub is a folder here: its cache, which transformers reads without a network.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from recsys.config import Config, ContentSettings, LoraSettings, ModalitySettings
from recsys.content.encoders import build as encoders
from recsys.content.encoders.build import Encoder
from recsys.content.encoders.identity import (
    FILE,
)
from recsys.content.encoders.pretrained import tiny_model, tiny_tokenizer
from recsys.data.items.kind import make_kind
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.recsys.em3_runs import em3_config

NAME = "someone/tiny-bert"
COMMITS = ("a" * 40, "b" * 40)  # of other weights
WHERE = "content.modalities.text"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose branch main is at the first of `COMMITS`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--tiny-bert"
    for number, commit in enumerate(COMMITS):
        model: Any = tiny_model("random:bert", "")
        with torch.no_grad():
            model.encoder.layer[2].output.dense.bias.add_(number)
        write_encoder(repository / "snapshots" / commit, model)
    (repository / "refs").mkdir()
    set_main(repository, COMMITS[0])
    return repository


def write_encoder(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def small_dataset(folder: Path) -> str:
    return str(write_dataset(folder / "data", {"train": 8, "valid": 8, "test": 8}, num_items=10))


def set_main(repository: Path, commit: str) -> None:
    (repository / "refs" / "main").write_text(commit)


def encoder_of(name: str) -> Encoder:
    modality = ModalitySettings("text", "text", encoder=name)
    return encoders.make_encoder(make_kind(WHERE, modality))


def config_of(folder: Path, encoder: str, training: Any = "lora") -> Config:
    text = ModalitySettings(
        "text",
        "text",
        encoder=encoder,
        training=training,
        lora=LoraSettings(rank=2, top_layers=1),
        max_length=8,
    )
    content = ContentSettings(modalities={"text": text}, dim=16)
    return em3_config(folder, content=content, epochs=1)


def test_one_encoder_has_one_identity_whatever_its_place_and_training(
    hub: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(hub / "snapshots" / COMMITS[0], tmp_path / "copy")
    identity, copy = encoder_of(NAME).identity, encoder_of(str(folder)).identity
    assert identity is not None and copy is not None
    assert (copy.weights, copy.preparation) == (identity.weights, identity.preparation)
    assert copy.revision is None
    modality = config_of(tmp_path, NAME).content.modalities["text"]  # type: ignore[union-attr]
    lora = encoders.make_encoder(make_kind(WHERE, modality)).identity
    assert lora is not None and lora.weights == identity.weights


def test_a_run_is_not_continued_nor_used_with_another_revision(hub: Path, tmp_path: Path) -> None:
    data, run = small_dataset(tmp_path), tmp_path / "run"
    config = config_of(tmp_path, NAME)
    message = (
        rf"encoders.json: .*'{NAME}' at revision {COMMITS[0]} "
        rf".* .*'{NAME}' at revision {COMMITS[1]} .*other weights"
        rf".*content.modalities.text.revision to {COMMITS[0]}"
    )
    with joined_ranks("cpu") as ranks:
        train(config, data, run, ranks)
        record = json.loads((run / FILE).read_text())
        assert record["text"]["revision"] == COMMITS[0]
        load_run(run, None, ranks, "cpu")
        set_main(hub, COMMITS[1])
        with pytest.raises(ValueError, match=message):
            load_run(run, None, ranks, "cpu")
        config.epochs = 2
        with pytest.raises(ValueError, match=message):
            train(config, data, run, ranks)


@pytest.mark.parametrize("change", ["weights", "preparation"])
def test_a_folder_that_has_changed_is_noticed_though_all_layers_trained(
    tmp_path: Path, change: str
) -> None:
    model: Any = tiny_model("random:bert", "")
    folder = write_encoder(tmp_path / "encoder", model)
    data, run = small_dataset(tmp_path), tmp_path / "run"
    with joined_ranks("cpu") as ranks:
        train(config_of(tmp_path, str(folder), "full"), data, run, ranks)
        if change == "weights":
            model.encoder.layer[0].output.dense.bias.data.add_(1)
            model.save_pretrained(folder)
        else:
            tokenizer = tiny_tokenizer()
            cased = type(tokenizer)(vocab=tokenizer.get_vocab(), do_lower_case=False)
            cased.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"other {change}"):
            load_run(run, None, ranks, "cpu")
