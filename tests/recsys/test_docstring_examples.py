"""The `Example::` of each public class and function runs as it stands, and ends without an error.

Public are the names in `__all__` of the packages below, and the parts that users derive from.
"""

import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.distributed.ranks import joined_ranks
from recsys.model.auxiliary import Distillation
from recsys.plug_in import DLRMWithContent
from recsys.plug_in.added_columns import AddedColumns

PACKAGES = ("recsys", "recsys.optimizer", "embeddings")
PARTS = [AddedColumns, Distillation, DLRMWithContent] + [
    getattr(package, name) for package in map(import_module, PACKAGES) for name in package.__all__
]


def example_of(part: Any) -> str:
    """The indented block behind `Example::`."""
    found = re.search(r"^Example::\n\n((?:(?:    .*)?\n)+)", f"{inspect.getdoc(part)}\n", re.M)
    assert found is not None, f"{part.__name__} has no Example::"
    return textwrap.dedent(found.group(1))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_the_example_in_the_docstring_runs(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)

    with joined_ranks("cpu"), torch.random.fork_rng():
        exec(example_of(part), names)

    assert part.__name__ in names, "an example imports what it shows"
