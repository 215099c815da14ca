"""The map of raw ids that a run has learned is the package's, too."""

from __future__ import annotations

from pathlib import Path

import torch

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.distributed.ranks import joined_ranks
from recsys.serving.bounded_file import load_bounded, save_bounded


def test_the_map_of_a_job_is_loaded_by_a_process_without_one(tmp_path: Path) -> None:
    settings = VocabularySettings("bounded")
    shop = Column("id", num_embeddings=6, vocabulary=settings)
    schema = Schema("item", None, {"item": Column("id", num_embeddings=3), "shop": shop})
    ids = torch.tensor([90, 2**40, 90])
    with joined_ranks("cpu") as ranks:
        learned = BoundedVocabulary(6, process_group=ranks.group)
        expected = learned.rows_of(ids, step=0, training=True)
        save_bounded(tmp_path, "shop", learned)

    loaded = load_bounded(tmp_path, "shop", schema)

    assert torch.equal(loaded.rows_of(ids, step=0, training=False), expected)
    assert expected.unique().numel() == 2
