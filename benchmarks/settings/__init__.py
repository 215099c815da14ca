"""Settings A (stored features) and B (raw text): a recipe each and its synthetic dataset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.dataset import DatasetSize, write_dataset

FOLDER = Path(__file__).parent
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Setting:
    """A recipe, the size of its data, and overrides of the recipe."""

    name: str
    recipe: Path
    size: DatasetSize
    overrides: tuple[str, ...] = ()  # command-line arguments of `recsys train`

    def with_data(self, **sizes: Any) -> Setting:
        """Return the same recipe on another dataset; `sizes` replace fields of `DatasetSize`."""
        return replace(self, size=replace(self.size, **sizes))

    def prepared(self, out: Path, device: Device = "cpu") -> tuple[str, tuple[str, ...]]:
        """Write the dataset under `out` if it is missing; return its folder and the overrides."""
        data = write_dataset(out / self._data_name(), self.size, shared_items=out / "items")
        return str(data), (*self.overrides, "--cache", str(out / "cache"), "--device", device)

    def _data_name(self) -> str:
        size, default = self.size, DatasetSize()
        differences = [
            f"{name}={getattr(size, name)}"
            for name in DatasetSize.__dataclass_fields__
            if getattr(size, name) != getattr(default, name)
        ]
        return "-".join(["data", *differences])


QUICK_SIZE = DatasetSize(
    num_rows=256, num_items=60, num_users=40, num_tags=20, history=6, text_dim=8, image_dim=12
)
QUICK: tuple[str, ...] = (
    *("--batch_size", "16", "--embedding.dim", "16", "--content.dim", "16"),
    *("--contrastive.dim", "16", "--ranking.attention_units", "[8,4]"),
    *("--ranking.mlp_units", "[16]", "--ranking.cross_rank", "4"),
)
A = Setting("A", FOLDER / "a.yaml", DatasetSize())
B = Setting("B", FOLDER / "b.yaml", DatasetSize(num_items=4_000, words=22, text_dim=0, image_dim=0))


def setting(name: str, quick: bool = False) -> Setting:
    """Return setting `A` or `B`, in full or in its quick form.

    Raises:
        ValueError: there is no such setting.
    """
    settings = {"A": A, "B": B}
    if name not in settings:
        raise ValueError(f"setting '{name}' is unknown; choose one of {sorted(settings)}")
    sized = settings[name]
    if not quick:
        return sized
    overrides, size = QUICK, QUICK_SIZE
    if name == "B":
        overrides += ("--content.modalities.title.encoder", "random:bert")
        overrides += ("--content.modalities.title.max_length", "8")
        size = replace(size, words=4, text_dim=0, image_dim=0)
    return replace(sized, size=size, overrides=overrides)
