"""What a batch is prepared with moves to the device as fast as what it came with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import Config
from recsys.content.batch_preparation import BatchPreparation
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.filesystem import Location
from recsys.data.interactions import Interactions
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.data.vocabularies import BoundedVocabularies, UnknownIds
from tests.datasets import write_dataset


class AddsBankItems(BatchPreparation):
    """Stands for the settings that choose items, which need several ranks."""

    def _with_items(self, batch: Batch, step: int, *_: bool) -> Batch:
        return replace(batch, bank_items=torch.tensor([step]))


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("preparation_class", [AddsBankItems, BatchPreparation])
def test_what_was_added_to_a_pinned_batch_is_pinned_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preparation_class: type[BatchPreparation],
    is_pinned: bool,
) -> None:
    root = Location.of(write_dataset(tmp_path))
    schema = load_schema(root)
    rows = ParquetRows.of_split(root, "valid", schema)
    pinned: list[int] = []

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: is_pinned)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    vocabularies = BoundedVocabularies(schema, [])
    preparation = preparation_class(Config(), None, None, vocabularies)
    batches = iter(Interactions(rows, BatchBuilder(schema, ["user"]), 8))
    prepared = preparation(batches, UnknownIds(schema), 7, training=True)
    batch = next(iter(prepared))
    if isinstance(preparation, AddsBankItems):
        assert batch.bank_items.tolist() == [7]
        assert (batch.bank_items.data_ptr() in pinned) == is_pinned
    else:
        assert pinned == []  # as it came, so nothing is done twice
