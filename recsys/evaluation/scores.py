"""Stores the scores of a split row by row in the run's folder, so that runs can be compared.

Two runs that scored the same rows are compared row by row or user by user without loading their
models (`recsys.evaluation.bootstrap`).

Shapes: N rows of the split, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.checkpoint.manifest import model_of
from recsys.data.filesystem import Location, whole_file
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet


@dataclass(frozen=True)
class SplitScores:
    """Logits and labels of a split's rows, ordered by position."""

    positions: np.ndarray  # int64 [N], the row's index in the split
    groups: np.ndarray  # int64 [N], its user
    items: np.ndarray  # int64 [N]
    counts: np.ndarray  # int64 [N], training rows of its item
    labels: np.ndarray  # float32 [N, C]
    logits: np.ndarray  # float32 [N, C]
    label_names: tuple[str, ...]  # [C]


MODEL = "model"  # key of the file's metadata
INTEGERS = {
    "row": "positions",
    "group": "groups",
    "item": "items",
    "training_impressions": "counts",
}


def scores_file(run: Path, split: str) -> Path:
    """Return the file in which a run keeps the scores of a split.

    Raises:
        ValueError: the split is no name of a folder.
    """
    if not split or Path(split).name != split:
        raise ValueError(f"--split '{split}': not the name of a split, such as test")
    return run / f"scores_{split}.parquet"


def write_scores(scores: SplitScores, path: Path, model: str | None = None) -> None:
    """Write scores as Parquet; the file appears whole or not at all.

    Columns are `row`, `group`, `item` and `training_impressions`, and `label_NAME` and
    `logit_NAME` for each label.

    Args:
        scores: of the rows of a split.
        path: the file.
        model: identifies the model, as `model_of` its run.
    """
    columns = {column: getattr(scores, name) for column, name in INTEGERS.items()}
    for index, name in enumerate(scores.label_names):
        columns[f"label_{name}"] = scores.labels[:, index]
        columns[f"logit_{name}"] = scores.logits[:, index]
    with whole_file(path) as partial:
        table = pa.table(columns).replace_schema_metadata({MODEL: model} if model else None)
        pq.write_table(table, partial, write_page_checksum=True)


def read_scores(path: Path) -> SplitScores:
    """Read scores that `write_scores` wrote.

    Raises:
        ValueError: the file is missing or cannot be read, or a column is missing.
    """
    file = Location.of(str(path))
    with open_parquet(file) as parquet:
        columns = parquet.schema_arrow.names
        names = tuple(name.removeprefix("label_") for name in columns if name.startswith("label_"))
        if not names:
            raise ValueError(f"{file}: has no column label_NAME, so these are no scores")
        for name in [*INTEGERS, *(f"logit_{label}" for label in names)]:
            column_type(parquet, file, name)
        try:
            table = parquet.read()
        except READ_ERRORS as error:
            raise ValueError(f"{file}: cannot be read ({error}); write it again") from error
    integers = {name: table[column].to_numpy() for column, name in INTEGERS.items()}
    labels, logits = (
        np.stack([table[f"{kind}_{name}"].to_numpy() for name in names], axis=1)
        for kind in ("label", "logit")
    )
    return SplitScores(**integers, labels=labels, logits=logits, label_names=names)


def check_model(path: Path, run: Path) -> None:
    """Check that scores are of the best model that their run has now.

    Raises:
        ValueError: they are of another: training went on since, or the file is of another run.
    """
    with open_parquet(Location.of(str(path))) as parquet:
        stored = (parquet.schema_arrow.metadata or {}).get(MODEL.encode())
    now = model_of(run)
    if stored is not None and now is not None and stored.decode() != now:
        raise ValueError(
            f"{path}: holds scores of another model than {run}/checkpoints/best has now; write "
            f"them anew with `recsys evaluate --run {run}`"
        )


def with_labels(scores: SplitScores, names: tuple[str, ...], where: str) -> SplitScores:
    """Return scores with these labels in this order.

    Raises:
        ValueError: a label is missing; `where` names the scores in the message.
    """
    if missing := sorted(set(names) - set(scores.label_names)):
        raise ValueError(f"{where}: has labels {list(scores.label_names)}, not {missing}")
    order = [scores.label_names.index(name) for name in names]
    labels, logits = scores.labels[:, order], scores.logits[:, order]
    return replace(scores, labels=labels, logits=logits, label_names=names)


def check_same_rows(first: SplitScores, second: SplitScores, where: str) -> None:
    """Check that both scores are of the same rows.

    Args:
        first: scores.
        second: scores to compare with them.
        where: names both in the error message.

    Raises:
        ValueError: positions, groups, labels or item counts differ; the message names which.
    """
    for name in ("positions", "groups", "labels", "counts"):
        one, other = getattr(first, name), getattr(second, name)
        if one.shape != other.shape:
            raise ValueError(f"{where}: {name} differ, of shape {one.shape} and {other.shape}")
        differs = (one != other).reshape(len(one), -1).any(axis=1)
        if differs.any():
            row = int(differs.argmax())
            raise ValueError(
                f"{where}: {name} differ in {differs.sum():,} of {len(one):,} rows, first in row "
                f"{row} ({one[row]} and {other[row]}); compare runs on the same split, trained on "
                "the same rows"
            )
