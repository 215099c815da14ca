"""The `Example::` of each part that users take by itself runs as it stands."""

import inspect
import re
import textwrap
from typing import Any

import pytest

from embeddings import MemoryBank
from recsys import ContentBranch, ContentIDContrastive, FusionQFormer
from recsys.model.auxiliary import Distillation
from recsys.optimizer import LearningRateShare
from recsys.plug_in import DLRMWithContent
from recsys.plug_in.added_columns import AddedColumns

PARTS = (
    AddedColumns,
    ContentBranch,
    ContentIDContrastive,
    DLRMWithContent,
    Distillation,
    FusionQFormer,
    LearningRateShare,
    MemoryBank,
)


def example_of(part: type) -> str:
    """The indented block behind `Example::`."""
    found = re.search(r"^Example::\n\n((?:(?:    .*)?\n)+)", f"{inspect.getdoc(part)}\n", re.M)
    assert found is not None, f"{part.__name__} has no Example::"
    return textwrap.dedent(found.group(1))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_the_example_in_the_docstring_runs(part: type) -> None:
    names: dict[str, Any] = {}

    exec(example_of(part), names)

    assert part.__name__ in names, "an example imports what it shows"
