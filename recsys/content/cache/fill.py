"""Computes the outputs of an encoder's frozen part once per item and keeps them on disk.

Interrupted work continues where it stopped.
Shapes: N rows of the store, n rows of a call, D width of the frozen part's output.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recsys.content.cache.files import (
    DistinctRows,
    EarlierCache,
    Parts,
    cache_folder,
    caches_of,
    dtype_of,
    encoder_key,
    find_in,
    write_about,
)
from recsys.content.encoders.base import CacheReport, Encoder
from recsys.data.items.content_store import ContentStore
from recsys.data.items.ragged_array import HASHES, RaggedArray, RowWriter, share_rows
from recsys.distributed.log import progress_bar
from recsys.distributed.ranks import Ranks
from recsys.storage.files import whole_folder

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
LINE = "{n:,} of {total:,} items, {rate_noinv_fmt}, {remaining} left"
ITEMS_PER_CALL = 64
SECONDS_UNTIL_VISIBLE = 120  # network folders appear on other machines with a delay


class FillProgress:
    """Progress of all ranks, extrapolated from this one's `share`; printed as a bar or as lines."""

    def __init__(self, name: str, total: int, share: int, shown: bool) -> None:
        self.name, self.total, self.share, self.shown = name, total, share, shown
        self.num_done = 0
        self._start = self._last_line = time.monotonic()
        self._bar = progress_bar(total, name, shown, unit=" items", unit_scale=True)

    def add(self, items: int) -> None:
        self.num_done += items
        # Ranks have equal shares and do not communicate while they encode.
        done_by_all = round(self.total * self.num_done / max(self.share, 1))
        self._bar.update(done_by_all - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and self.shown and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            elapsed = now - self._start
            counts = tqdm.format_meter(
                done_by_all, self.total, elapsed, unit=" items", bar_format=LINE
            )
            logger.info(f"encoding '{self.name}': {counts}")

    def close(self) -> None:
        self._bar.close()


@torch.no_grad()
def cache_frozen_outputs(
    store: ContentStore, name: str, encoder: Encoder, ranks: Ranks
) -> CacheReport:
    """Fill or reuse the cache of `encoder.frozen` outputs and serve them from `store`.

    A collective. The encoder's frozen layers are dropped afterwards.

    Raises:
        ValueError: on every rank, if one cannot read its content.
        RuntimeError: on every rank, if one fails otherwise. Finished work is kept.
    """
    start = time.perf_counter()
    fill = _Fill(store, name, encoder, ranks)
    if not all(ranks.gather(fill.folder.exists())):
        fill.run()
    with ranks.raise_on_all_ranks():
        _wait_for(fill.folder)
        store.use(name, fill.folder)
    encoder.drop_frozen_layers()
    files = fill.folder.glob("*.npy")
    encoder.cache_report = CacheReport(
        folder=fill.folder,
        items=int((store.arrays[name].lengths > 0).sum()),
        num_bytes=sum(path.stat().st_size for path in files),
        encoded=sum(ranks.gather(fill.encoded)),
        seconds=time.perf_counter() - start,
    )
    return encoder.cache_report


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while not folder.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: was made but does not show on this machine; give each machine a folder "
                "of its own (setting `cache`)"
            )
        os.listdir(folder.parent)  # makes a network file system refresh its listing
        time.sleep(0.1)


@dataclass
class _Plan:
    """Work of all ranks on a folder: earlier caches, rows [n] of calls, which calls are missing."""

    earlier: list[EarlierCache]
    calls: list[np.ndarray]
    missing_calls: list[int]


class _Fill:
    def __init__(self, store: ContentStore, name: str, encoder: Encoder, ranks: Ranks) -> None:
        self.name, self.encoder, self.ranks = name, encoder, ranks
        self.kind = store.kinds[name]
        self.source, self.content = store.arrays[name], store.folders[name].name
        self.key = encoder_key(encoder)
        self.cache, self.hashes = store.cache, store.hashes[name]
        self.distinct = DistinctRows.of(self.hashes)
        self.folder = cache_folder(self.cache, name, self.content, self.key, self.distinct.repeat)
        self.parts = Parts(store.cache / f".{self.folder.name}.parts")
        self.encoded = 0

    def run(self) -> None:
        """Encode all missing items and write the cache. A collective."""
        ranks = self.ranks
        self.encoder.to(ranks.device).eval()
        mark = self._mark_machine()
        marks = [other for other in ranks.gather(mark) if other is not None]
        try:
            sharers = self._ranks_that_share(marks)
            plan = self._plan(sharers)
            with ranks.raise_on_all_ranks():
                self._encode_share(plan, sharers, failed=self.parts.folder / f".failed-{marks[0]}")
            with ranks.raise_on_all_ranks():
                if ranks.rank == sharers[0] and not self.folder.exists():
                    with self._unless_another_job_was_faster():
                        self._put_together(plan)
            if ranks.rank == sharers[0]:
                shutil.rmtree(self.parts.folder, ignore_errors=True)
        finally:
            if mark is not None:
                (self.parts.folder / mark).unlink(missing_ok=True)
                (self.parts.folder / f".failed-{marks[0]}").unlink(missing_ok=True)

    @contextmanager
    def _unless_another_job_was_faster(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self.folder.exists():
                raise

    def _mark_machine(self) -> str | None:
        """Create a file by which other machines detect that they share the folder. A collective."""
        mark = f".machine-{uuid.uuid4().hex}" if self.ranks.is_first_of_machine else None
        with self.ranks.raise_on_all_ranks():
            if mark is not None:
                self.parts.folder.mkdir(parents=True, exist_ok=True)
                with self._unless_another_job_was_faster():
                    (self.parts.folder / mark).touch()
        return mark

    def _ranks_that_share(self, marks: list[str]) -> list[int]:
        """Return the ranks that share this rank's folder, including itself. A collective."""
        visible_marks = [mark for mark in marks if (self.parts.folder / mark).exists()]
        return [
            rank
            for rank, marks_of_rank in enumerate(self.ranks.gather(visible_marks))
            if marks_of_rank == visible_marks
        ]

    def _plan(self, sharers: list[int]) -> _Plan:
        """Return the work to do, as the first of the sharers sees it. A collective."""
        names: list[str] | None = None
        todo: list[int] | None = None
        with self.ranks.raise_on_all_ranks():
            if self.ranks.rank == sharers[0]:
                names = caches_of(self.cache, self.key)
                earlier = find_in(self.cache, names, self.hashes, self.distinct.first)
                calls = self._calls(earlier)
                todo = self._not_done(calls)
        names, todo = self.ranks.gather((names, todo))[sharers[0]]
        assert names is not None and todo is not None
        with self.ranks.raise_on_all_ranks():
            earlier = find_in(self.cache, names, self.hashes, self.distinct.first)
            calls = self._calls(earlier)
        return _Plan(earlier, calls, todo)

    def _calls(self, earlier: list[EarlierCache]) -> list[np.ndarray]:
        """Group the contents that no earlier cache has by length; each group [n] is one call."""
        missing = np.zeros(len(self.source), bool)
        missing[self.distinct.first] = True
        for cache in earlier:
            missing[cache.rows] = False
        rows = np.flatnonzero(missing)
        rows = rows[np.argsort(self.source.lengths[rows], kind="stable")]
        return [rows[at : at + ITEMS_PER_CALL] for at in range(0, len(rows), ITEMS_PER_CALL)]

    def _not_done(self, calls: list[np.ndarray]) -> list[int]:
        if self.folder.exists():
            return []
        names = [self._name_of(call) for call in calls]
        whole = set(self.parts.remove_damaged(names))
        return [index for index, name in enumerate(names) if name not in whole]

    def _name_of(self, call: np.ndarray) -> str:  # [n]
        return self.parts.name_of(self.hashes[call])

    def _encode_share(self, plan: _Plan, sharers: list[int], failed: Path) -> None:
        todo = [plan.calls[index] for index in plan.missing_calls]
        share = todo[sharers.index(self.ranks.rank) :: len(sharers)]
        total, items = (sum(map(len, calls)) for calls in (todo, share))
        if total:
            logger.info(self._announcement(plan, total))
        # In random order, so that several jobs on one folder share the work and the rate shown
        # averages over short and long texts.
        np.random.default_rng().shuffle(share)
        progress = FillProgress(self.name, total, items, shown=self.ranks.is_first)
        with closing(progress):
            try:
                with self._unless_another_job_was_faster():
                    for call in share:
                        if failed.exists() or self.folder.exists():
                            return  # another rank failed, or another job has finished the cache
                        self._encode(call)
                        progress.add(len(call))
            except Exception:
                with suppress(OSError):
                    failed.touch()
                raise

    def _announcement(self, plan: _Plan, total: int) -> str:
        earlier = sum(len(cache.rows) for cache in plan.earlier)
        num_done = len(self.distinct.first) - earlier - total
        reused = [f"{num_done:,} were done before"] if num_done else []
        reused += [f"{earlier:,} are in an earlier cache"] if earlier else []
        items = self.distinct.describe(total)
        return (
            f"encoding '{self.name}' of {items} once, into {self.folder}"
            f"{''.join(f'; {text}' for text in reused)}"
        )

    def _encode(self, call: np.ndarray) -> None:  # [n]
        name = self._name_of(call)
        if self.parts.holds(name):
            return  # another job was faster
        content = self.kind.as_input(*self.source.gather(call))
        output = self.encoder.frozen_outputs(content.to(self.ranks.device))
        lengths = output.mask.sum(dim=1).cpu().numpy()
        self.parts.write(name, lengths, output.values[output.mask].cpu().numpy())
        self.encoded += len(call)

    def _put_together(self, plan: _Plan) -> None:
        """Write the cache from earlier caches and parts; it appears whole or not at all."""
        with whole_folder(self.folder) as temporary:
            places = self.distinct.places
            lengths = np.zeros(places.max(initial=-1) + 1, np.int64)
            for cache in plan.earlier:
                lengths[places[cache.rows]] = RaggedArray(cache.folder).lengths[cache.places]
            for call in plan.calls:
                lengths[places[call]] = self.parts.read(self._name_of(call), "lengths")
            shape = (self.encoder.frozen_dim,)
            with closing(RowWriter(temporary, lengths, shape, dtype_of(self.encoder))) as writer:
                for rows, values in self._outputs(plan):
                    writer.write(places[rows], values)
            if self.distinct.repeat:
                share_rows(temporary, places)
            np.save(temporary / HASHES, self.hashes)
            tokens, width = int(lengths.sum()), self.encoder.frozen_dim
            counts = {"items": self.distinct.num_rows, "tokens": tokens, "width": width}
            about = self.key, self.content, self.encoder, self.kind.modality
            write_about(temporary, *about, counts)

    def _outputs(self, plan: _Plan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for cache in plan.earlier:
            array = RaggedArray(cache.folder)
            for at in range(0, len(cache.rows), ITEMS_PER_CALL):
                values, mask = array.gather(cache.places[at : at + ITEMS_PER_CALL])
                yield cache.rows[at : at + ITEMS_PER_CALL], values[mask]
        for call in plan.calls:
            yield call, self.parts.read(self._name_of(call), "values")
