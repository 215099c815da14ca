"""Words or tags of a text: entries are rows by a hash, the encoder sums their embeddings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cosine_similarity

from embeddings import HashVocabulary
from recsys.cli import main
from recsys.config import ModalitySettings
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.terms import TermEncoder
from recsys.content.kinds.terms import Terms
from recsys.data.items.kind import ContentInput, make_kind
from tests.datasets import write_dataset
from tests.recsys.command_runs import train_argv

TAGS = ModalitySettings("terms", "title", separator=",", max_length=3)
TERMS = {"kind": "terms", "column": "title"}


def rows_of(*terms: str) -> list[int]:
    rows = HashVocabulary(TAGS.num_embeddings).rows_of(pa.array(terms, pa.string()))
    return rows[:, 0].tolist()


@pytest.mark.parametrize(
    ("text", "separator", "terms"),
    [
        ("Time travel, Puzzle", ",", ["time travel", "puzzle"]),
        ("puzzle, , Puzzle ,sci-fi", ",", ["puzzle", "sci-fi"]),
        ("Sci-Fi puzzle", None, ["sci", "fi", "puzzle"]),
        ("a|b, c|d", ",|", ["a", "b", "c"]),  # max_length 3
        ("a^b]c", "]^", ["a", "b", "c"]),
        ("Cafe\u0301 हिन्दी ❤\ufe0f", None, ["caf\u00e9", "हिन्दी"]),
        ("Cafe\u0301, caf\u00e9", ",", ["caf\u00e9"]),
        (" ", ",", []),
        (None, None, []),
    ],
)
def test_an_entry_is_the_row_of_a_distinct_term(
    text: str | None, separator: str | None, terms: list[str]
) -> None:
    kind = Terms("content.modalities.tags", replace(TAGS, separator=separator))
    column = pa.array([text, "puzzle"], pa.string())
    lengths, entries = kind.entries(column, "items: column 'title'", lambda *problem: None)
    assert lengths.tolist() == [len(terms), 1]
    assert entries.tolist() == rows_of(*terms, "puzzle")


@pytest.fixture
def content() -> ContentInput:
    """Three items with two terms, one term and none."""
    rows = torch.tensor([[5, 2], [2, 0], [0, 0]])
    return ContentInput(rows, torch.tensor([[True, True], [True, False], [False, False]]))


def test_outputs_and_gradients_equal_a_normalised_sum_of_rows(content: ContentInput) -> None:
    encoder = TermEncoder(8, 16, trains=True)
    weight = encoder.weight.detach().clone().requires_grad_()
    sums = [weight[5] + weight[2], weight[2]]
    expected = torch.stack([*(row / row.norm() for row in sums), torch.zeros(16)])
    tokens = encoder(content)
    torch.testing.assert_close(tokens.values[:, 0], expected)
    assert tokens.mask[:, 0].tolist() == [True, True, False]
    slope = torch.randn(16, generator=torch.Generator().manual_seed(0))
    (tokens.values @ slope).sum().backward()
    (expected @ slope).sum().backward()
    torch.testing.assert_close(encoder.weight.grad, weight.grad)


def test_cosines_begin_as_those_of_the_bags_of_terms() -> None:
    rows = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9]])
    tokens = TermEncoder(16, 65536, trains=False)(ContentInput(rows, torch.ones(3, 4).bool()))
    first, second, other = tokens.values[:, 0]
    assert cosine_similarity(first, second, dim=0).item() == pytest.approx(0.5, abs=0.02)
    assert cosine_similarity(first, other, dim=0).item() == pytest.approx(0, abs=0.02)


def test_two_builds_begin_with_the_same_embeddings() -> None:
    first, second = (build_encoder("tags", TAGS).state_dict()["weight"] for _ in range(2))
    assert first.equal(second)
    assert np.unique(first.numpy()).size == 2  # signs of one size


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"training": "lora"}, "`training: frozen` or `full`, not lora"),
        ({"encoder": "random:bert"}, "an embedding table in place of an encoder"),
        ({"separator": ""}, "separator is empty"),
        ({"max_images": 2}, "max_images is of kind image"),
    ],
)
def test_settings_of_other_kinds_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_kind("content.modalities.tags", ModalitySettings(**TERMS, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "setting", "value", "readers"),
    [
        ("text", "separator", ",", "terms"),
        ("text", "num_embeddings", 64, "terms"),
        ("text", "embedding_dim", 64, "terms"),
        ("text", "image_size", 32, "image, frames"),
        ("image", "max_length", 8, "text, terms"),
        ("feature", "max_length", 8, "text, terms"),
        ("terms", "revision", "main", "text, image, frames"),
    ],
)
def test_a_setting_that_a_kind_does_not_read_is_refused(
    kind: str, setting: str, value: Any, readers: str
) -> None:
    encoder = {"text": "random:bert", "image": "random:vit"}.get(kind)
    modality = ModalitySettings(kind, "tags", encoder, **{setting: value})
    problem = f"tags: kind {kind} does not read {setting}; remove it.*read by: {readers}\\)"
    with pytest.raises(ValueError, match=problem):
        make_kind("content.modalities.tags", modality)


@pytest.mark.parametrize("training", ["frozen", "full"])
def test_a_run_scores_by_the_terms_that_it_trained_with(tmp_path: Path, training: str) -> None:
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    words = f"{{words: {{kind: terms, column: text, training: {training}, embedding_dim: 8}}}}"
    assert main(train_argv(data, run, "--content.modalities", words)) == 0
    trained = json.loads((run / "metrics.json").read_text())["test"]
    assert main(["evaluate", "--run", str(run), "--data", str(data), "--split", "test"]) == 0
    evaluated = json.loads((run / "evaluation_test.json").read_text())
    assert evaluated["auc"] == pytest.approx(trained["auc"], abs=1e-9)
    assert evaluated["logloss"] == pytest.approx(trained["logloss"], abs=1e-6)
