"""Variants of the quick setting A, and jobs built from them in this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.settings import setting
from benchmarks.timing.steps import ProductSteps, Variant
from recsys.distributed.ranks import joined_ranks

NO_DROPOUT = ("--content.fusion.dropout", "0", "--ranking.dropout", "0")


def quick_variant(folder: Path, *overrides: str, name: str = "A") -> Variant:
    """The quick form of a setting, its data and cache in `folder`."""
    sized = setting(name, quick=True)
    data, argv = sized.prepared(folder)
    return Variant("variant", str(sized.recipe), data, (*argv, *overrides), loaded_batches=2)


@contextmanager
def product_steps(variant: Variant) -> Iterator[ProductSteps]:
    """The product's steps on a single rank."""
    with joined_ranks("cpu") as ranks:
        yield ProductSteps(variant, ranks)
