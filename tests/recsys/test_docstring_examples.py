"""The `Example::` of each public class and function runs as it stands, and ends without an error.

Public are the names in `__all__` of every package, and the parts that users derive from. An example
of the plug-in has what its reader has: a DLRM, a loader, a device, and settings beside a dataset.
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
from recsys.serving import Scorer
from recsys.serving.retrieval import Retrieved, Retriever
from tests.datasets import write_dataset
from tests.recsys.plug_in.plug_in_runs import build_dlrm, user_batches

PROJECT = Path(__file__).parents[2]
PACKAGES = (
    *("embeddings", "recsys", "recsys.content.encoders.build"),
    *("recsys.optimizer", "recsys.plug_in", "recsys.serving", "recsys.serving.retrieval"),
)
PUBLIC_OBJECTS = {
    getattr(package, name) for package in map(import_module, PACKAGES) for name in package.__all__
}
# The tests of these run their examples, in folders that have a package or vectors.
SERVED = {Scorer, Retrieved, Retriever}
OBJECTS = sorted({Distillation, *PUBLIC_OBJECTS} - SERVED, key=lambda obj: obj.__name__)
SETTINGS = """\
data: shop
item: item
history: viewed
cache: cache
content:
  dim: 16
  modalities: {clip: {kind: feature, column: clip}}
  fusion: {num_heads: 2}
"""


def example_of(obj: Any) -> str:
    """The indented block behind `Example::`."""
    match = re.search(r"^Example::\n\n((?:(?:    .*)?\n)+)", f"{inspect.getdoc(obj)}\n", re.M)
    assert match is not None, f"{obj.__name__} has no Example::"
    return textwrap.dedent(match.group(1))


def run_example(obj: Any, names: dict[str, Any]) -> None:
    """Runs the example of a class or function, which must import it."""
    exec(example_of(obj), names)
    assert obj.__name__ in names, "an example imports what it shows"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and the settings of a plug-in."""
    folder = tmp_path_factory.mktemp("examples")
    write_dataset(folder / "shop", {})
    (folder / "content.yaml").write_text(SETTINGS)
    return folder


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: obj.__name__)
def test_the_example_in_the_docstring_runs(
    obj: Any, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    if obj.__module__.startswith("recsys.plug_in"):
        dlrm, device = build_dlrm("dlrm", "cpu"), torch.device("cpu")
        names = {"dlrm": dlrm, "loader": user_batches(0, 2), "device": device}
    monkeypatch.chdir(shop)

    with joined_ranks("cpu"), torch.random.fork_rng():
        run_example(obj, names)


def test_every_package_with_public_names_is_read_here() -> None:
    files = [
        file
        for folder in ("recsys", "embeddings", "launch", "benchmarks")
        for file in (PROJECT / folder).rglob("*.py")
        if re.search("^__all__ =", file.read_text(), re.M)
    ]
    names = [".".join(file.relative_to(PROJECT).with_suffix("").parts) for file in files]
    assert {name.removesuffix(".__init__") for name in names} == set(PACKAGES)
