"""Scorer: answers ranking requests from a package, without process group, encoders or dataset.

Shapes: N candidates, L history items, D dimension, C labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.checkpoint.run_schema import load_run_schema
from recsys.config.server import FeatureSettings
from recsys.data.schema import Schema
from recsys.model.losses import predictions
from recsys.serving.exported_graph import Graph, graph_file, load_graph
from recsys.serving.features.package_features import FOLDER, PackageFeatures
from recsys.serving.features.source import FeatureSettingsError, feature_source
from recsys.serving.new_items.added_items import FEATURES, AddedItems, grow_vocabulary
from recsys.serving.package import Manifest, differing_versions, read_manifest
from recsys.serving.ranking_graph import RankingInputs
from recsys.serving.requests import HistoryRows, RequestReader, RequestRows, TableRows
from recsys.serving.vector_file import VectorFile, VectorFileShape
from recsys.storage.manifest import VerifiedFiles, content_digest

logger = logging.getLogger(__name__)

LONGEST = 300  # characters of another library's error in a message


class Scorer:
    """Scores candidates for a user, from the files of a package.

    Several threads may call `score` at once. Processes share tables and content vectors.

    Example::

        from recsys.serving import Scorer

        scorer = Scorer.load("package")
        user = {"user": 7, "genres": [1, 2], "price": 0.5}
        user |= {"city": "Rom", "when": "2026-11-26T12:00:00"}
        history = {"history": [3, 12], "history_liked": [1.0, 0.0]}
        scores = scorer.score(user, history, candidates=[4, 5, 6])
        assert scores.shape == (3, len(scorer.labels))
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        previous: Scorer | None = None,
        features: FeatureSettings | None = None,
    ) -> None:
        self.manifest, self.labels = manifest, tuple(manifest.labels)
        self.schema = schema = load_run_schema(folder)
        self._added = AddedItems.open(folder, manifest.added)
        grow_vocabulary(schema, [self._added.ids])
        bounded = {table: load_bounded(folder, table, schema) for table in manifest.bounded}
        package_features = PackageFeatures(folder, schema, self._added.features)
        self.feature_types = package_features.types
        package_features.version = features_version(manifest) if schema.features else ""
        source = feature_source(features or FeatureSettings(), package_features, self.feature_types)
        self.read = RequestReader(schema, manifest.pooled, bounded, manifest.dense, source)
        self._tables, self._content = (
            {
                name: VectorFile(folder / kind / f"{name}.vectors", VectorFileShape(**shape))
                for name, shape in shapes.items()
            }
            for kind, shapes in (("tables", manifest.tables), ("content", manifest.content))
        )
        self.graph_file = graph_file(folder, manifest)
        self._graph = self._load_graph(folder, previous)
        self.verified = VerifiedFiles()

    @classmethod
    def load(
        cls,
        package: str | Path,
        verify: bool = True,
        previous: Scorer | None = None,
        verified: VerifiedFiles | None = None,
        features: FeatureSettings | None = None,
    ) -> Self:
        """Load a package and score once, so that the first request is as fast as the next.

        Args:
            package: folder that `recsys export` wrote.
            verify: read every file and compare its hashes; False: compare sizes only.
            previous: the package that this one replaces; unchanged files are not read again.
            verified: files whose hashes were compared before; default: by `previous`.
            features: source of the columns that are looked up; default: the package's own files.

        Raises:
            ValueError: the folder is no package, a file of it differs (it is named), or the files
                do not fit together.
        """
        folder = Path(package).resolve()  # a link may be replaced meanwhile
        if verified is None and previous is not None:
            verified = previous.verified
        verified = VerifiedFiles(verified)
        manifest = read_manifest(folder, verify, verified)
        try:
            if versions := differing_versions(manifest):
                logger.warning(
                    f"{folder}: written with {', '.join(versions)}, so scores may differ; export "
                    "the run again with the versions that serve it"
                )
            scorer = cls(folder, manifest, previous, features)
            scorer._warm_up()
        except FeatureSettingsError:
            raise
        except Exception as error:  # damaged graphs raise errors of any class
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
            raise ValueError(
                f"{folder}: its files do not fit together or are damaged ({reason}); export the "
                "run again"
            ) from error
        scorer.verified = verified
        return scorer

    @property
    def features_version(self) -> str:
        """The version of the features that are looked up, if the source has one; else empty."""
        assert self.read.features is not None
        return self.read.features.version

    def _load_graph(self, folder: Path, previous: Scorer | None) -> Graph:
        path, file = folder / self.graph_file, self.manifest.files[self.graph_file]
        if previous is None:
            return load_graph(path)
        is_same = previous.manifest.files[previous.graph_file] == file
        return previous._graph if is_same else load_graph(path, previous._graph)

    def score(
        self,
        user: Mapping[str, Any],
        history: Mapping[str, Sequence[Any]] | Sequence[Any] = (),
        candidates: Mapping[str, Sequence[Any]] | Sequence[Any] = (),
    ) -> np.ndarray:  # float32 [N, C]
        """Return the prediction of each label for each candidate, as `recsys predict` does.

        Args:
            user: values of the files' columns besides the ranked item, history and labels; columns
                that the package looks up by ids may be left out, and those of items must be.
            history: the user's items, oldest first; with parallel lists or several histories,
                each list by its column.
            candidates: ids of the items to rank; or lists by column, for columns that differ
                between candidates.

        Raises:
            ValueError: names the column with a missing, unknown or unusable value.
        """
        return self.score_rows(self.read(user, history, candidates))

    def score_rows(self, rows: RequestRows) -> np.ndarray:  # float32 [N, C]
        """Return the predictions for a request of `read`; ValueError: they are not finite."""
        if not len(rows.target):
            return np.zeros((0, len(self.labels)), np.float32)
        return predictions(self._run(rows), self.schema.label_losses).numpy()

    @torch.inference_mode()
    def _run(self, rows: RequestRows) -> Tensor:
        outputs = self._graph(*self._inputs(rows).arguments())
        if not torch.isfinite(outputs).all():
            raise ValueError(
                "the logits are not finite; look at the scale of the numbers of user and candidates"
            )
        return outputs

    def _inputs(self, rows: RequestRows) -> RankingInputs:
        num_rows, manifest = len(rows.target), self.manifest
        columns = [np.broadcast_to(rows.dense[name], num_rows) for name in manifest.dense]
        dense = np.stack(columns, axis=1) if columns else np.zeros((num_rows, 0), np.float32)
        no_items = {manifest.target_item: np.zeros(0, np.int64)}
        no_history = HistoryRows(no_items, np.zeros((0, 0), np.float32))
        first, *extra = rows.histories or [no_history]
        history_items = next(iter(first.ids.values()))
        target_in_bank = torch.zeros(num_rows, 0)
        if manifest.searches:
            target_in_bank = self._content_vectors("history", rows.target)
        return RankingInputs(
            pooled=[self._pooled(name, rows.pooled[name], num_rows) for name in manifest.pooled],
            dense=torch.from_numpy(dense),
            target=self._tables[manifest.target_item].rows(rows.target),
            history=self._events(first),
            parallel=torch.from_numpy(first.numbers),
            target_items=torch.from_numpy(rows.target),
            history_items=torch.from_numpy(history_items),
            target_content=self._content_vectors("target", rows.target),
            history_content=self._content_vectors("history", history_items),
            target_in_bank=target_in_bank,
            further=[self._events(events) for events in extra],
            further_parallel=[torch.from_numpy(events.numbers) for events in extra],
            further_content=[self._extra_content(events) for events in extra],
        )

    def _content_vectors(self, kind: str, items: np.ndarray) -> Tensor:  # [N] -> [N, E]
        """Return content vectors, also of added items; zeros if content is not read."""
        if kind not in self._content:
            history = self._content.get("history")
            return torch.zeros(len(items), 0 if history is None else history.shape.dim)
        vectors = self._content[kind].rows(items)
        self._added.replace_vectors(vectors, items)
        return vectors

    def _extra_content(self, history: HistoryRows) -> Tensor:  # [L, E]; E = 0 if not read
        name, ids = next(iter(history.ids.items()))
        if name in self.manifest.content_histories:
            return self._content_vectors("history", ids)
        return torch.zeros(len(history.numbers), 0)

    def _events(self, history: HistoryRows) -> Tensor:  # [L, D]
        """Return the sum of the vectors that each event has in the columns of a history."""
        total = torch.zeros(())
        for name, ids in history.ids.items():
            vectors = self._tables[self.schema.table_of(name)].rows(ids)
            total = total + vectors.view(-1, self.schema.rows_per_id(name), vectors.shape[1]).sum(1)
        return total

    def _pooled(self, name: str, column: TableRows, num_rows: int) -> Tensor:  # [N, D]
        vectors = self._tables[self.schema.table_of(name)].rows(column.rows)
        lengths = torch.from_numpy(np.asarray(column.lengths, np.int64))
        sums = torch.segment_reduce(vectors, "sum", lengths=lengths, initial=0.0)
        return sums.expand(num_rows, -1)  # a user's sum is the same for all candidates

    def _warm_up(self) -> None:
        row = np.zeros(1, np.int64)
        pooled = {name: TableRows(row, row + 1) for name in self.manifest.pooled}
        dense = {name: np.zeros(1, np.float32) for name in self.manifest.dense}
        self._run(RequestRows(pooled, dense, row, self.read.histories([])))


def features_version(manifest: Manifest) -> str:
    """Return the start of a hash of the features of a package, also of added items."""
    files = {
        name: file
        for name, file in manifest.files.items()
        if name.startswith(f"{FOLDER}/") or name.endswith(f"/{FEATURES}")
    }
    return content_digest(files)[:12]


def bounded_file(folder: Path, table: str) -> Path:
    """Return the file of a map of raw ids that was learned in training."""
    return folder / "vocabulary" / f"{table}.safetensors"


def load_bounded(folder: Path, table: str, schema: Schema) -> BoundedVocabulary:
    """Load the map of a table into a vocabulary without a process group."""
    settings = schema.vocabulary_of(table)
    assert settings is not None
    vocabulary = BoundedVocabulary(
        schema.limit(table), settings.admit_after, settings.half_life, process_group=None
    )
    stored = load_file(bounded_file(folder, table))
    for name, state in vocabulary.state_dict().items():
        assert isinstance(state, Tensor)  # one process holds the map whole
        state.copy_(stored[name])
    return vocabulary
