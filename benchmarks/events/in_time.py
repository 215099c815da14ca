"""Measure whether a dataset with drawn negatives leaks its test split, where content decides.

    python -m benchmarks.events.in_time --log FOLDER --out FOLDER

`--log` holds the files of the recipe `recsys/recipes/events/ifdb.yaml`. Two figures detect items
known too early: the share of test positives without a training row, and the AUC of an item's
mean label. A logistic regression on counts and text similarity shows what the columns can rank.
With `--runs`, finished trainings on the same dataset are compared with the regression.

Shapes: R rows of a split, L items of all their histories, N items.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.results import RESULTS, Result, write_result
from recsys.data.events.prepare import prepare_events
from recsys.evaluation.bootstrap import Interval, paired_difference
from recsys.evaluation.metrics import grouped_auc
from recsys.evaluation.scores import read_scores, scores_file

RECIPE = Path("recsys/recipes/events/ifdb.yaml")
TEXTS = ("title", "tags", "description")
UNSEEN = "46.9% within 0.5%"  # of test positives, counted in the log by hand
METRICS = [(metric, part) for metric in ("gauc", "auc") for part in ("all", "unseen")]
MIN_AUC = {"mean training label of the item": 0.45, "counts and similarity of texts": 0.78}


def benchmark(log: Path, out: Path, runs: Sequence[Path] = (), results: Path = RESULTS) -> None:
    """Measure the dataset.

    Args:
        log: folder of the files that the recipe names.
        out: folder for the dataset, which is removed afterwards.
        runs: trainings of one recipe on this dataset, one for each seed.
        results: folder for the figures.
    """
    report = prepare_events(RECIPE, out / "ifdb", log)
    unseen = report["splits"]["test"]["unseen"]
    aucs, gaucs, scores = _aucs(out / "ifdb")
    shutil.rmtree(out / "ifdb")
    rows = [("share of test positives without a training row", f"{unseen:.1%}", UNSEEN)]
    for name, auc in aucs.items():
        aim = f"at least {MIN_AUC[name]:.2f}" if name in MIN_AUC else ""
        rows.append((f"test AUC of {name}", f"{auc:.3f}", aim))
    rows += [(f"test {name} of counts and similarity", f"{value:.3f}", "") for name, value in gaucs]
    gains = _gains(scores, runs) if runs else []
    rows += [
        (f"gain of {len(runs)} runs over it in {name}", _text(gain), "") for name, gain in gains
    ]
    record = {"benchmark": "events_in_time", "report": report, "unseen": unseen, "auc": aucs}
    record |= {"gauc": dict(gaucs), "gains": {name: asdict(gain) for name, gain in gains}}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(list(aucs), list(aucs.values()))
        axes.axvline(0.5, color="gray")
        axes.set_xlabel("AUC of the test split")
        figure.tight_layout()

    reading = [
        "A mean training label below 0.5 would tell that items of the future were drawn as "
        "negatives in training.",
        "A count of 0 is of an item's first play, or of an item that was published and that nobody "
        "had played yet.",
    ]
    columns = ["figure", "measured", "aim"]
    title = "A log where content decides, prepared in time"
    write_result(Result("events_in_time", title, [record], columns, rows, draw, reading), results)


def _gains(scores: np.ndarray, runs: Sequence[Path]) -> list[tuple[str, Interval]]:  # scores [R]
    """Return the metrics of runs, by mean over them, less those of the scores."""
    ours = [read_scores(scores_file(run, "test")) for run in runs]
    logits = scores[ours[0].positions][:, None].astype(np.float32)
    floor = [[replace(ours[0], logits=logits)]]
    gains = []
    for metric, subset in METRICS:
        gain = paired_difference(floor, [[run] for run in ours], metric, subset)
        assert gain is not None
        gains.append((f"{metric.upper()}, {subset} rows", gain))
    return gains


def _text(gain: Interval) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _aucs(data: Path) -> tuple[dict[str, float], list[tuple[str, float]], np.ndarray]:
    """Return test AUCs of scores that nothing but a logistic regression was trained for.

    And the GAUC of the last of them, over all rows and over those of items without a training row,
    and its scores [R].
    """
    items = pq.read_table(data / "items")
    texts = [
        " ".join(text or "" for text in row)
        for row in zip(*(items[name].to_pylist() for name in TEXTS), strict=True)
    ]
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    train, test = (pq.read_table(data / split) for split in ("train", "test"))
    labels, test_labels = (table["played"].to_numpy() for table in (train, test))
    item_indices, test_item_indices = (
        pc.index_in(table["item"], items["item"]).to_numpy() for table in (train, test)
    )
    rows_of_item = np.bincount(item_indices, minlength=len(items))
    positives = np.bincount(item_indices, labels, len(items))
    mean = np.where(rows_of_item, positives / np.maximum(rows_of_item, 1), labels.mean())
    columns, test_columns = (_columns(table, items["item"], tfidf) for table in (train, test))
    aucs = {"mean training label of the item": roc_auc_score(test_labels, mean[test_item_indices])}
    names = {"counts": slice(0, -1), "counts and similarity of texts": slice(None)}
    for name, part in names.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(columns[:, part], labels)
        scores = model.decision_function(test_columns[:, part])
        aucs[name] = float(roc_auc_score(test_labels, scores))
    users = test["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    unseen = rows_of_item[test_item_indices] == 0
    gaucs = []
    for name, part in (("GAUC", slice(None)), ("GAUC unseen", unseen)):
        _, user_aucs, sizes = grouped_auc(test_labels[part] > 0, scores[part], users[part])
        gaucs.append((name, float(np.average(user_aucs, weights=sizes))))
    return aucs, gaucs, scores


def _columns(table: pa.Table, items: pa.ChunkedArray, tfidf: csr_matrix) -> np.ndarray:
    """Return log counts, whether the history is empty, and mean cosine to the history: [R, 6]."""
    history = table["history"].combine_chunks()
    lengths = pc.list_value_length(history).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(table)), lengths)  # [L]
    indices = pc.index_in(history.flatten(), items).to_numpy()
    targets = pc.index_in(table["item"], items).to_numpy()
    average = csr_matrix((1 / lengths[rows], (rows, indices)), (len(table), len(items))) @ tfidf
    similarity = np.asarray(average.multiply(tfidf[targets]).sum(axis=1)).ravel()
    names = [name for name in table.column_names if "plays_of" in name]
    counts = [np.log1p(table[name]) for name in names]
    return np.stack([*counts, lengths == 0, similarity], axis=1)


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
