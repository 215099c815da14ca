"""Store the scores of a split by row, so that runs can be compared. Shapes: N rows, C labels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.checkpoint.files import model_of
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet
from recsys.storage.files import atomic_file
from recsys.storage.location import Location


@dataclass(frozen=True)
class SplitScores:
    """Logits and labels of a split's rows, ordered by position."""

    positions: np.ndarray  # int64 [N], the row's index in the split
    groups: np.ndarray  # int64 [N], the row's user
    items: np.ndarray  # int64 [N]
    counts: np.ndarray  # int64 [N], number of training rows of the row's item
    labels: np.ndarray  # float32 [N, C], NaN if unknown
    logits: np.ndarray  # float32 [N, C]
    label_names: tuple[str, ...]  # [C]
    weights: np.ndarray | None = None  # float32 [N]; None: 1 each
    losses: tuple[str, ...] = ()  # [C], one per label; empty: bce for all

    def loss_of(self, label: int) -> str:
        return self.losses[label] if self.losses else "bce"

    def counted(self, label: int) -> Self:
        """Return the rows whose label is known and whose weight is above 0."""
        rows = ~np.isnan(self.labels[:, label])
        if self.weights is not None:
            rows &= self.weights > 0
        return self if rows.all() else self.take(rows)

    def take(self, rows: np.ndarray) -> Self:  # rows: bool [N]
        names = ("positions", "groups", "items", "counts", "labels", "logits")
        columns = {name: getattr(self, name)[rows] for name in names}
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, **columns, weights=weights)


MODEL, LOSSES = "model", "losses"  # keys of the file's metadata
INTEGERS = {
    "row": "positions",
    "group": "groups",
    "item": "items",
    "training_impressions": "counts",
}


def scores_file(run: Path, split: str) -> Path:
    """Return the path of a run's scores of a split; a ValueError for a bad split name."""
    if not split or Path(split).name != split:
        raise ValueError(f"--split '{split}': not the name of a split, such as test")
    return run / f"scores_{split}.parquet"


def write_scores(scores: SplitScores, path: Path, model: str | None = None) -> None:
    """Write scores as Parquet, atomically."""
    columns = {column: getattr(scores, name) for column, name in INTEGERS.items()}
    for index, name in enumerate(scores.label_names):
        columns[f"label_{name}"] = scores.labels[:, index]
        columns[f"logit_{name}"] = scores.logits[:, index]
    if scores.weights is not None:
        columns["weight"] = scores.weights
    metadata = {MODEL: model, LOSSES: ",".join(scores.losses)}
    metadata = {name: value for name, value in metadata.items() if value}
    table = pa.table(columns, metadata=metadata or None)
    with atomic_file(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def read_scores(path: Path) -> SplitScores:
    """Read scores that `write_scores` wrote; a ValueError if a file or column is unusable."""
    file = Location.of(str(path))
    with open_parquet(file) as parquet:
        columns = parquet.schema_arrow.names
        names = tuple(name.removeprefix("label_") for name in columns if name.startswith("label_"))
        if not names:
            raise ValueError(f"{file}: has no column label_NAME, so these are no scores")
        floats = [f"{kind}_{label}" for kind in ("label", "logit") for label in names]
        for name in [*INTEGERS, *floats]:
            column_type(parquet, file, name)
        try:
            table = parquet.read()
        except READ_ERRORS as error:
            raise ValueError(f"{file}: cannot be read ({error}); write it again") from error
    for name in [*INTEGERS, *floats]:
        _check_values(table, name, file)
    numbers: dict[str, Any] = {name: table[column].to_numpy() for column, name in INTEGERS.items()}
    for kind in ("label", "logit"):
        columns_of_kind = [table[f"{kind}_{name}"].to_numpy() for name in names]
        numbers[f"{kind}s"] = np.stack(columns_of_kind, axis=1)
    numbers["weights"] = table["weight"].to_numpy() if "weight" in columns else None
    stored = (table.schema.metadata or {}).get(LOSSES.encode())
    losses = tuple(stored.decode().split(",")) if stored else ()
    return SplitScores(**numbers, label_names=names, losses=losses)


def _check_values(table: pa.Table, name: str, file: Location) -> None:
    """Raise a ValueError if the column is empty, of another type, has a null or a bad logit."""
    column = table[name]
    is_of_type = pa.types.is_integer if name in INTEGERS else pa.types.is_floating
    is_complete = len(column) > 0 and is_of_type(column.type) and not column.null_count
    if not is_complete or (name.startswith("logit_") and not np.isfinite(column.to_numpy()).all()):
        raise ValueError(
            f"{file}: column '{name}' has no rows, another type ({column.type}), nulls or values "
            "that are not finite; write the file again with `recsys evaluate`"
        )


def check_model(path: Path, run: Path) -> None:
    """Raise a ValueError unless the scores come from their run's current best model."""
    with open_parquet(Location.of(str(path))) as parquet:
        stored = (parquet.schema_arrow.metadata or {}).get(MODEL.encode())
    model = model_of(run)
    if stored is not None and model is not None and stored.decode() != model:
        raise ValueError(
            f"{path}: holds scores of another model than {run}/checkpoints/best has now; write "
            f"them anew with `recsys evaluate --run {run}`"
        )


def with_labels(scores: SplitScores, names: tuple[str, ...], where: str) -> SplitScores:
    """Return scores with these labels in this order; a missing label is a ValueError."""
    if missing := sorted(set(names) - set(scores.label_names)):
        raise ValueError(f"{where}: has labels {list(scores.label_names)}, not {missing}")
    order = [scores.label_names.index(name) for name in names]
    labels, logits = scores.labels[:, order], scores.logits[:, order]
    losses = tuple(scores.loss_of(index) for index in order)
    return replace(scores, labels=labels, logits=logits, label_names=names, losses=losses)


def check_same_rows(first: SplitScores, second: SplitScores, where: str) -> None:
    """Raise a ValueError unless both scores are of the same rows; `where` names both."""
    losses, other_losses = (
        [scores.loss_of(index) for index in range(len(scores.label_names))]
        for scores in (first, second)
    )
    if losses != other_losses:
        raise ValueError(f"{where}: losses of the labels differ ({losses} and {other_losses})")
    for name in ("positions", "groups", "labels", "counts", "weights"):
        column, other = (
            np.ones(len(scores.positions))
            if getattr(scores, name) is None
            else getattr(scores, name)
            for scores in (first, second)
        )
        if column.shape != other.shape:
            raise ValueError(f"{where}: {name} differ, of shape {column.shape} and {other.shape}")
        is_same = (column == other) | ((column != column) & (other != other))  # NaN: unknown label
        differs = ~is_same.reshape(len(column), -1).all(axis=1)
        if differs.any():
            row = int(differs.argmax())
            raise ValueError(
                f"{where}: {name} differ in {differs.sum():,} of {len(column):,} rows, first in "
                f"row {row} ({column[row]} and {other[row]}); compare runs on the same split, "
                "trained on the same rows"
            )
