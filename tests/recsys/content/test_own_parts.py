"""A fusion and a modality kind of one's own: one file and one line of YAML each."""

import json
from pathlib import Path

import pytest
import yaml
from torch.distributed.checkpoint import FileSystemReader

from recsys.cli import main
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY, train_argv

FUSION = '''
import torch
from torch import nn

class Gated(nn.Module):
    """The sum of all tokens, each times a gate of its modality."""

    def __init__(self, dim, num_modalities, start):
        super().__init__()
        self.gate = nn.Parameter(torch.full((num_modalities, dim), start))

    def forward(self, tokens, mask, modality):
        return (tokens * self.gate[modality] * mask.unsqueeze(-1)).sum(dim=1)
'''
KIND = '''
import numpy as np
from recsys.content.encoders.base import Encoder
from recsys.data.items.kind import ModalityKind

class Letters(Encoder):
    output_dim, caches = 3, False

    def forward(self, content):
        return content

class LetterCounts(ModalityKind):
    """How often a text has each of some letters: one token per item."""

    column_kind = "text"
    entry_shape = (3,)

    def entries(self, chunk, where, report):
        texts, letters = chunk.to_pylist(), self.modality.options["letters"]
        counts = [[text.count(letter) for letter in letters] for text in texts if text]
        return np.array([int(bool(text)) for text in texts]), np.array(counts).reshape(-1, 3)

    def encoder(self, entry_shape):
        return Letters()
'''


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset and both files, from which Python imports."""
    write_dataset(tmp_path / "data")
    (tmp_path / "my_fusion.py").write_text(FUSION)
    (tmp_path / "my_kinds.py").write_text(KIND)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "value", "trained"),
    [
        ("fusion", {"name": "my_fusion:Gated", "options": {"start": 0.5}}, "fusion.gate"),
        (
            "modalities",
            {
                "letters": {
                    "kind": "my_kinds:LetterCounts",
                    "column": "text",
                    "options": {"letters": "aer"},
                }
            },
            "projections.letters.weight",
        ),
    ],
)
def test_a_part_in_a_file_of_one_s_own_trains_by_one_line_of_yaml(
    workdir: Path, setting: str, value: dict[str, object], trained: str
) -> None:
    recipe = yaml.safe_load(TINY.read_text())
    recipe["content"][setting] = value
    (workdir / "own.yaml").write_text(yaml.safe_dump(recipe))
    argv = train_argv(workdir / "data", workdir / "run", "--config", str(workdir / "own.yaml"))
    assert main(argv) == 0
    assert json.loads((workdir / "run" / "metrics.json").read_text())["test"]["auc"] > 0
    (metadata, *_) = (workdir / "run" / "checkpoints").rglob(".metadata")
    names = FileSystemReader(metadata.parent).read_metadata().state_dict_metadata
    assert any(name.endswith(f"content.{trained}") for name in names)
    argv = ["--config", str(workdir / "own.yaml"), "--data", str(workdir / "data")]
    assert main(["describe", *argv, "--device", "h100"]) == 0
    assert main(["evaluate", "--run", str(workdir / "run"), "--data", str(workdir / "data")]) == 0
