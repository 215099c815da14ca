"""A trained run has rows made of content for items that it never ranked, and for later ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from embeddings.ridge import fit_ridge
from recsys.build import Job
from recsys.checkpoint import cold_row_init
from recsys.checkpoint.cold_row_init import trained_counts
from recsys.data.prepare_vocabulary import prepare_vocabularies
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.training.train import train
from tests.recsys.checkpoint.schema_runs import rewrite, write_data
from tests.recsys.checkpoint.warm_start.warm_runs import config_of, ids_of, whole

WORDS = ["--embedding.tables", "{item: {new_rows: content}}"]
NEVER_RANKED, LATER = 28, 901  # raw ids


def without(item: int, table: pa.Table) -> pa.Table:
    """The rows that neither rank an item nor have it in the history."""
    histories = table["history"].to_pylist()
    has_no_item = [
        ranked != item and item not in (history or [])
        for ranked, history in zip(table["item"].to_pylist(), histories, strict=True)
    ]
    return table.filter(pa.array(has_no_item))


def with_later_item(items: pa.Table) -> pa.Table:
    """The items and one more, with the content of another."""
    place = items.column_names.index("item")
    extra = items.slice(3, 1).set_column(place, "item", pa.array([LATER], pa.int64()))
    return pa.concat_tables([items, extra])


def table_and_vectors(job: Job) -> tuple[Tensor, Tensor]:
    bank = job.em3.content.bank if job.em3.content is not None else None
    assert bank is not None
    table = whole(job.model.state_dict()["embeddings.embeddings.item.weight"])
    return table, bank.lookup(torch.arange(40))[0]


@pytest.mark.long
def test_items_without_training_have_the_row_that_their_content_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_row_init, "COLD_BELOW", 2)
    data, run = write_data(tmp_path / "data"), tmp_path / "run"
    rewrite(data / "train", lambda table: without(NEVER_RANKED, table))
    with joined_ranks("cpu") as ranks:
        config = config_of(tmp_path, *WORDS, "--epochs", "1")
        train(config, str(data), run, ranks)
        counts = trained_counts(run, 40).of(np.arange(40))
        ids = ids_of(data)
        table, vectors = table_and_vectors(load_run(run, None, ranks, "cpu"))
        learned = torch.from_numpy(counts >= 2)
        fitted = fit_ridge(vectors[learned], table[learned])
        assert fitted is not None
        never = ids.index(NEVER_RANKED)
        torch.testing.assert_close(table[never], fitted(vectors[never]).float())
        assert (table[39] == table[38]).all()  # of unknown ids and of none: the mean

        rewrite(data / "items", with_later_item)
        prepare_vocabularies(str(data))
        later = ids_of(data).index(LATER)
        table, vectors = table_and_vectors(load_run(run, str(data), ranks, "cpu"))
        torch.testing.assert_close(table[later], fitted(vectors[later]).float())
