"""Compares a retrieval model with popularity, item-CF, content and text neighbours, and blends.

Neighbours are items that resemble those of the history, whose latest items weigh more: by their
users (item-CF), by order (transitions), by the cosine of content vectors, by TF-IDF of all texts.
If users may take items again, the history itself is a baseline, too. Decay and weights of a blend
are those that rank the targets of validation best. `recsys export-vectors --blend true` serves the
blend with the model, which uses only the nearest texts of an item.

Shapes: R rows with a query, I items of the catalogue, S history items of all rows, D width.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, identity, issparse

from recsys.build import Job
from recsys.checkpoint.partitions import learned_folders
from recsys.checkpoint.run_folder import read_item_counts
from recsys.config.ranking import RetrievalSettings
from recsys.content.encoders.base import Encoder
from recsys.data.item_frequency import frequency_masks, rows_that_count
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.row_source import RowSource, open_rows
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.evaluation.bootstrap import effective_users, interval_stretch
from recsys.evaluation.metrics import MIN_USERS
from recsys.evaluation.predict import load_run
from recsys.evaluation.retrieval import catalogue_vectors, retrieval_metrics, row_gains
from recsys.serving.retrieval import nearest_items
from recsys.serving.retrieval.catalogue import item_table, item_vectors, unit
from recsys.serving.retrieval.query_rows import (
    QueryRows,
    index_of,
    other_candidates,
    rank_among,
    rank_rows,
    read_query_rows,
)

logger = logging.getLogger(__name__)
DECAYS = (0.3, 0.5, 0.8, 1.0)  # weight of a history item relative to the next newer one
FACTORS = (0, 0.25, 0.5, 0.7, 1.4, 2, 4)  # multiples of a weight to try
NEW_FACTORS = (0.03, 0.1, 0.3, 1, 3)  # deviations of a new term to try, relative to the others'
MAX_SWEEPS = 4
MAX_SCORES = 2**25  # scores to choose weights by; more rows are sampled
SCORES_PER_BLOCK = 2**22
TEXT_NEIGHBOURS = 100


@dataclass(frozen=True)
class Catalogue:
    """All items, with the statistics and vectors by which terms of a blend score them.

    Neighbours are by users (item_cf), by order (transitions), by text to the nearest items
    (near_text), and an item itself (repeat) where items may be taken again.
    """

    popularity: np.ndarray  # float32 [I], logarithms of counts
    neighbours: dict[str, csr_matrix]  # [I, I]
    # Of the model; of length one: content vectors, means of encoders, and sparse TF-IDF of texts.
    vectors: dict[str, np.ndarray | csr_matrix]  # float32 [I, D]

    @property
    def baselines(self) -> tuple[str, ...]:
        return self._present("item_cf", "transitions", "content", "encoders", "text", "repeat")

    @property
    def served_terms(self) -> tuple[str, ...]:
        """Terms of the blend with the model."""
        return self._present("item_cf", "transitions", "content", "near_text", "repeat", "model")

    def _present(self, *names: str) -> tuple[str, ...]:
        available = {*self.neighbours, *self.vectors}
        return ("popularity", *(name for name in names if name in available))

    def scores(
        self, rows: QueryRows, decay: float, names: Sequence[str]
    ) -> dict[str, np.ndarray]:  # float32 [R, I]
        history = rows.history_weights(len(self.popularity), decay)
        scores: dict[str, np.ndarray] = {}
        for name in names:
            if name in self.neighbours:
                term = history @ self.neighbours[name]
            elif name == "popularity":
                term = np.broadcast_to(self.popularity, history.shape)
            elif name == "model":
                term = rows.queries @ self.vectors[name].T
            else:
                term = (history @ self.vectors[name]) @ self.vectors[name].T
            scores[name] = term.toarray() if issparse(term) else term
        return scores


@dataclass(frozen=True)
class Blend:
    """A weighted sum of terms."""

    decay: float
    weights: Mapping[str, float]

    def scores(self, terms: Mapping[str, np.ndarray]) -> np.ndarray:  # [R, I]
        weighted = (
            np.float32(weight) * terms[name] for name, weight in self.weights.items() if weight
        )
        return sum(weighted, np.zeros((), np.float32))


def choose_blend(
    catalogue: Catalogue, rows: QueryRows, names: tuple[str, ...], settings: RetrievalSettings
) -> Blend:
    """Return the blend of terms whose decay and weights rank the targets of rows best.

    The measure is NDCG over all items, less noisy than that at a depth. Weights are at least 0.
    """
    if rows.weights is not None:
        rows = rows.take(np.flatnonzero(rows.weights.numpy() > 0))
    if not len(rows.targets):
        raise ValueError(
            "valid: no row with a weight has a positive first label and an item of "
            "items/*.parquet, and validation chooses the weights; give it such rows"
        )
    num_items = len(catalogue.popularity)
    rows = rows.sample(max(MAX_SCORES // num_items, 1))
    if len(names) > 1:
        message = "choosing the weights of %s parts by %s rows of validation and %s items"
        logger.info(message, len(names), f"{len(rows.targets):,}", f"{num_items:,}")
    is_other = other_candidates(rows, num_items, settings.exclude_seen)

    def ndcg(scores: np.ndarray) -> float:
        above, tied = map(torch.from_numpy, rank_among(scores, rows.targets, is_other))
        gains = row_gains("ndcg", above, tied, num_items).numpy()
        return float(np.average(gains, weights=rows.weights))

    best, highest = Blend(1.0, {}), -1.0
    for decay in DECAYS:
        weights, value = best_weights(catalogue.scores(rows, decay, names), ndcg)
        if value > highest:
            best, highest = Blend(decay, weights), value
    return best


Measure = Callable[[np.ndarray], float]  # of scores [R, I]


def best_weights(
    terms: Mapping[str, np.ndarray], measure: Measure
) -> tuple[dict[str, float], float]:
    """Return weights of at least 0 for a sum of terms [R, I], and the measure of that sum.

    The better of two coordinate ascents wins: from the best term alone, so that the sum is never
    worse than a term, and from all terms at equal deviations, which seldom drops one by chance.
    """
    single_terms = {name: measure(term) for name, term in terms.items()}
    starts = [dict.fromkeys(terms, 0.0) | {max(single_terms, key=single_terms.__getitem__): 1.0}]
    # A term that is constant in these rows has no weight, as it may vary in others.
    deviations = {name: float(term.std()) if np.ptp(term) else 0.0 for name, term in terms.items()}
    if any(deviations.values()):
        starts.append({name: 1 / width if width else 0.0 for name, width in deviations.items()})
    return max((_ascend(terms, measure, start) for start in starts), key=itemgetter(1))


def _ascend(
    terms: Mapping[str, np.ndarray], measure: Measure, start: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Set one weight after the other to the best of a few multiples, until none gains."""
    weights = dict(start)
    highest = measure(Blend(1.0, weights).scores(terms))
    for _ in range(MAX_SWEEPS):
        previous = highest
        for name, term in terms.items():
            other_terms = Blend(1.0, {key: weights[key] for key in terms if key != name})
            if not any(other_terms.weights.values()):
                continue
            scores = other_terms.scores(terms)
            unit = weights[name] or float(scores.std()) / max(float(term.std()), 1e-12)
            for factor in FACTORS if weights[name] else NEW_FACTORS:
                weight = unit * factor
                if (value := measure(scores + np.float32(weight) * term)) > highest:
                    highest, weights[name] = value, weight
        if highest == previous:
            break
    return weights, highest


@dataclass(frozen=True)
class RowGains:
    """NDCG of each row at the first depth, by name of the scores, and the rows' users."""

    users: np.ndarray
    weights: torch.Tensor | None
    ndcg: dict[str, torch.Tensor]  # float64 [R]

    def gain_over(self, name: str, baseline: str) -> list[float | None]:
        """Return the mean difference of two scores and its `interval`."""
        return interval(self.ndcg[name] - self.ndcg[baseline], self.users, self.weights)


def compare_with_baselines(
    run: Path, data: str | None, ranks: Ranks
) -> tuple[dict[str, Any], RowGains]:
    """Return `retrieval_metrics` on test of baselines, of a run's model and of blends, by name.

    `gain over blend` has the difference of NDCG at the first depth, and its interval over users. A
    run that is not finished, no retrieval model or without a history is a ValueError.
    """
    if ranks.world_size > 1:
        raise ValueError("baselines run in one process; start them without torchrun")
    job = load_run(run, data, ranks, ranks.device.type)
    settings = settings_with_vectors(run, job)
    items, catalogue = _read_catalogue(run, job, settings)
    # Encoder means are added only here: an export does not run the encoders for all items.
    if (encoders := _encoders(job, items)) is not None:
        catalogue.vectors["encoders"] = encoders
    counts = read_item_counts(run, job.schema.item_id_limit)
    valid = read_query_rows(job, "valid", items, counts)
    rows = read_query_rows(job, "test", items, counts)
    if not len(rows.targets):
        raise ValueError(
            f"{job.root / 'test'}: no row with a weight has a positive first label and an item of "
            "items/*.parquet, so that nothing is to be found; give it such rows"
        )
    baselines = catalogue.baselines
    compared: dict[str, tuple[str, ...]] = {name: (name,) for name in (*baselines, "model")}
    compared |= {"blend": baselines, "blend with model": catalogue.served_terms}
    reports, gains = {}, RowGains(rows.users, rows.weights, {})
    for name, terms in compared.items():
        blend = choose_blend(catalogue, valid, terms, settings)
        above, tied = _count_above_rows(catalogue, blend, rows, settings)
        gains.ndcg[name] = row_gains("ndcg", above, tied, settings.depths[0])
        choice = {"decay": blend.decay, "weights": dict(blend.weights)}
        reports[name] = choice | metrics_by_frequency(above, tied, rows, settings)
    for name in ("model", "blend with model"):
        reports[name]["gain over blend"] = gains.gain_over(name, "blend")
    return reports, gains


def metrics_by_frequency(
    above: torch.Tensor, tied: torch.Tensor, rows: QueryRows, settings: RetrievalSettings
) -> dict[str, dict[str, Any]]:  # int64 [R], int64 [R]
    """Return `retrieval_metrics` of all rows, and by the frequency of targets in training."""
    return {
        subset: retrieval_metrics(
            above[mask],
            tied[mask],
            None if rows.weights is None else rows.weights[mask],
            settings.depths,
        )
        for subset, mask in frequency_masks(rows.counts).items()
    }


def blend_to_serve(run: Path, job: Job) -> tuple[Catalogue, Blend]:
    """Return the items of a run, and the blend of model and baselines that validation chooses.

    A run without histories or without rows of validation is a ValueError.
    """
    settings = settings_with_vectors(run, job)
    items, catalogue = _read_catalogue(run, job, settings)
    valid = read_query_rows(job, "valid", items, read_item_counts(run, job.schema.item_id_limit))
    return catalogue, choose_blend(catalogue, valid, catalogue.served_terms, settings)


def settings_with_vectors(run: Path, job: Job) -> RetrievalSettings:
    """Return the settings of a model of item vectors; a ValueError refuses other models."""
    settings, schema = job.config.ranking, job.schema
    if schema.has_bounded_items:
        raise ValueError(
            f"{run}: '{schema.target_item}' has a vocabulary of kind bounded, with which histories "
            "are read by row, not by raw id, so that they have no neighbours; train with kind exact"
        )
    if isinstance(settings, RetrievalSettings) and settings.loss != "codes" and schema.history:
        return settings
    raise ValueError(
        f"{run}: a model of item vectors over histories is compared and blended with "
        f"baselines, and ranking.name is '{settings.name}'; give a run of two_tower on data "
        "with a history"
    )


def interval(
    differences: torch.Tensor,  # [R]
    users: np.ndarray,  # [R]
    weights: torch.Tensor | None = None,  # [R]
) -> list[float | None]:
    """Return the mean over rows, and the ends of its 95 % interval over users.

    Errors of a user's rows are correlated: the standard error is that of sums by user (Liang and
    Zeger 1986). Fewer than `MIN_USERS` have no interval.
    """
    shares = np.ones(len(users)) if weights is None else weights.double().numpy()
    shares = shares / shares.sum()
    mean = float(shares @ differences.numpy())
    _, user_index = np.unique(users, return_inverse=True)
    user_shares = np.bincount(user_index, shares)
    if (user_shares > 0).sum() < MIN_USERS:
        return [mean, None, None]
    errors = np.bincount(user_index, shares * (differences.numpy() - mean))
    stretch = interval_stretch(effective_users(user_shares))
    margin = 1.96 * stretch * float(np.sqrt(errors @ errors))
    return [mean, mean - margin, mean + margin]


def format_interval(gain: Sequence[float | None]) -> str:
    """Format the result of `interval`, such as +0.0116 [+0.0071, +0.0161]."""
    mean, lower, upper = gain
    ends = "without an interval: too few users"
    return f"{mean:+.4f} " + (ends if lower is None else f"[{lower:+.4f}, {upper:+.4f}] over users")


def format_baselines(reports: Mapping[str, Any]) -> str:
    """Format the result of `compare_with_baselines` as a text table."""
    metrics = [name for name in next(iter(reports.values()))["all"] if "@" in name]
    columns = [("all", name) for name in metrics] + [("unseen", metrics[0])]
    rows = [("", *metrics, f"{metrics[0]} unseen")]
    for name, report in reports.items():
        values = (report[subset][metric] for subset, metric in columns)
        rows.append((name, *("-" if value is None else f"{value:.4f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in rows
    )
    for name in ("model", "blend with model"):
        gained = next(metric for metric in metrics if metric.startswith("ndcg"))
        text += f"\n{name} – blend: {gained} {format_interval(reports[name]['gain over blend'])}"
    return text


def _count_above_rows(
    catalogue: Catalogue, blend: Blend, rows: QueryRows, settings: RetrievalSettings
) -> tuple[torch.Tensor, torch.Tensor]:  # int64 [R], int64 [R]
    size = max(SCORES_PER_BLOCK // len(catalogue.popularity), 1)
    counted = []
    for block in rows.blocks(size):
        scores = blend.scores(catalogue.scores(block, blend.decay, list(blend.weights)))
        counted.append(rank_rows(scores, block, settings.exclude_seen))
    above, tied = (torch.from_numpy(np.concatenate(column)) for column in zip(*counted))
    return above, tied


def _read_catalogue(
    run: Path, job: Job, settings: RetrievalSettings
) -> tuple[np.ndarray, Catalogue]:
    """Return the ids of all items, ascending, and their catalogue."""
    ids, vectors = catalogue_vectors(job, Lockstep(job.ranks))
    items = ids.numpy()
    users, event_items, pairs = _read_events(run, job, items)
    by_name: dict[str, np.ndarray | csr_matrix] = {"model": vectors.float().numpy()}
    if job.store is not None:
        by_name["content"] = unit(item_vectors(job, "content").vectors)
    counts = np.bincount(event_items, minlength=len(items))
    popularity = np.log1p(counts).astype(np.float32)
    neighbours = {
        "item_cf": nearest_items.user_similarities(users, event_items, len(items)),
        "transitions": nearest_items.transitions(pairs, counts),
    }
    table = None if job.schema.items is None else item_table(job)
    if table is not None and (texts := nearest_items.item_texts(table)) is not None:
        by_name["text"] = nearest_items.text_vectors(texts)
        neighbours["near_text"] = nearest_items.nearest(by_name["text"], TEXT_NEIGHBOURS)
    if not settings.exclude_seen:
        neighbours["repeat"] = identity(len(items), np.float32, "csr")
    return items, Catalogue(popularity, neighbours, by_name)


def _encoders(job: Job, items: np.ndarray) -> np.ndarray | None:  # [I, V]
    branch = job.em3.content
    if branch is None or not all(isinstance(model, Encoder) for model in branch.encoders.values()):
        return None
    return nearest_items.encoder_means(job, items) / np.float32(len(branch.encoders) ** 0.5)


def _read_events(
    run: Path, job: Job, items: np.ndarray
) -> tuple[np.ndarray, np.ndarray, csr_matrix]:
    """Return users and items' positions of training rows with a positive first label, and pairs.

    Rows are of all partitions that the run has learned from and that still exist, without rows of
    weight 0. Pairs [I, I] have the weights of history items (rows) and the row's item (columns).
    """
    schema, columns = job.schema, []
    label, pairs = schema.of_kind("label")[0], csr_matrix((len(items),) * 2)
    assert schema.history is not None
    for table in chain.from_iterable(rows.read(*rows.share(0, 1)) for rows in _sources(run, job)):
        events = RowColumns.of(table)
        targets = index_of(items, events.values(schema.target_item))
        is_positive = rows_that_count(table, schema) & (events.values(label) > 0) & (targets >= 0)
        events, targets = events.take(np.flatnonzero(is_positive)), targets[is_positive]
        history = index_of(items, events.values(schema.history))
        lengths = events.lengths(schema.history)
        pairs += nearest_items.pair_weights(history, lengths, targets, len(items))
        group = events.values(RAW_GROUP if RAW_GROUP in events.numbers else schema.group)
        columns.append((group.astype(np.int64), targets))
    users, event_items = (np.concatenate(column) for column in zip(*columns))
    return users, event_items, pairs


def _sources(run: Path, job: Job) -> Iterator[RowSource]:
    folders = learned_folders(run, job.train_folder)
    removed = [folder for folder in folders[:-1] if not (job.root / folder).exists()]
    if removed:
        logger.warning(
            f"{job.root}: {len(removed):,} of {len(folders):,} partitions that the run has learned "
            f"from are gone, from {removed[0]} to {removed[-1]}: the baselines learn from the "
            "others"
        )
    for folder in folders:
        if folder not in removed:
            config = job.config
            yield open_rows(config.source, job.root, folder, job.schema, config.on_bad_row)
