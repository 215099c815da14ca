"""Computes the outputs of an encoder's frozen part once per item and keeps them on disk.

Interrupted work continues where it stopped.
Shapes: N rows of the store, n rows of a call, D width of the frozen part's output.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recsys.content.cache.files import (
    DistinctRows,
    EarlierCache,
    Parts,
    caches_of,
    dtype_of,
    encoder_key,
    find_in,
    write_about,
)
from recsys.content.encoders.base import CacheReport, Encoder
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import digest_of
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
    """Progress of a rank through the items to encode, as a bar or as lines."""

    def __init__(self, name: str, total: int, shown: bool) -> None:
        self.name, self.shown, self._last_line = name, shown, time.monotonic()
        self._bar = progress_bar(total, name, shown, unit=" items", unit_scale=True)
        self.num_done, self._start = 0, self._last_line

    def add(self, items: int) -> None:
        self.num_done += items
        self._bar.update(items)
        now = time.monotonic()
        if self._bar.disable and self.shown and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            counts = tqdm.format_meter(
                self.num_done, self._bar.total, now - self._start, unit=" items", bar_format=LINE
            )
            logger.info(f"encoding '{self.name}': {counts}")

    def close(self) -> None:
        self._bar.close()


@torch.no_grad()
def cache_frozen_outputs(
    store: ContentStore, name: str, encoder: Encoder, ranks: Ranks
) -> CacheReport:
    """Fill or reuse the cache of `encoder.frozen` outputs and serve them from `store`.

    A collective. The encoder's frozen layers are dropped afterwards. Where one rank cannot read its
    content, or fails otherwise, all raise; finished work is kept.
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


class _Fill:
    def __init__(self, store: ContentStore, name: str, encoder: Encoder, ranks: Ranks) -> None:
        self.name, self.encoder, self.ranks = name, encoder, ranks
        self.kind = store.kinds[name]
        self.source, self.content = store.arrays[name], store.folders[name].name
        self.key = encoder_key(encoder)
        self.cache, self.hashes = store.cache, store.hashes[name]
        self.distinct = DistinctRows.of(self.hashes)
        self.folder = self.cache / f"frozen-{name}-{digest_of(self.content, self.key)}"
        self.parts = Parts(store.cache / f".{self.folder.name}.parts")
        self.encoded = 0

    def run(self) -> None:
        """Encode all missing items and write the cache. A collective."""
        ranks = self.ranks
        self.encoder.to(ranks.device).eval()
        number = ranks.from_first(secrets.randbits(32))  # of this job among all
        failed = self.parts.folder / f".failed-{number}"
        with ranks.raise_on_all_ranks():
            self.parts.folder.mkdir(parents=True, exist_ok=True)
            names = caches_of(self.cache, self.key)
            earlier = find_in(self.cache, names, self.hashes, self.distinct.first)
            calls = self._calls(earlier)
            if ranks.is_first_of_machine:
                self.parts.remove_damaged([self._name_of(call) for call in calls])
        try:
            with ranks.raise_on_all_ranks(), self._unless_another_job_was_faster():
                order = np.random.default_rng(number).permutation(len(calls))
                order = np.roll(order, -(len(calls) * ranks.rank // ranks.world_size))
                num_earlier = sum(len(cache.rows) for cache in earlier)
                self._encode_missing([calls[place] for place in order], num_earlier, failed)
            with ranks.raise_on_all_ranks():
                if ranks.is_first_of_machine and not self.folder.exists():
                    with self._unless_another_job_was_faster():
                        self._put_together(earlier, calls)
            if ranks.is_first_of_machine:
                shutil.rmtree(self.parts.folder, ignore_errors=True)
        finally:
            failed.unlink(missing_ok=True)

    @contextmanager
    def _unless_another_job_was_faster(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self.folder.exists():
                raise

    def _calls(self, earlier: list[EarlierCache]) -> list[np.ndarray]:
        """Group the contents that no earlier cache has by length; each group [n] is one call."""
        missing = np.zeros(len(self.source), bool)
        missing[self.distinct.first] = True
        for cache in earlier:
            missing[cache.rows] = False
        rows = np.flatnonzero(missing)
        rows = rows[np.argsort(self.source.lengths[rows], kind="stable")]
        return [rows[at : at + ITEMS_PER_CALL] for at in range(0, len(rows), ITEMS_PER_CALL)]

    def _name_of(self, call: np.ndarray) -> str:  # [n]
        return digest_of(self.hashes[call].tobytes())

    def _encode_missing(self, calls: list[np.ndarray], num_earlier: int, failed: Path) -> None:
        """Encode the calls that no rank or job has done, until all are; a failure ends all ranks.

        Each rank has them in an order of its own, so that ranks, machines and jobs that share a
        folder share the work, and the rate averages over short and long texts.
        """
        todo = [call for call in calls if not self.parts.holds(self._name_of(call))]
        total = sum(map(len, todo))
        if total:
            logger.info(self._announcement(total, num_earlier))
        with closing(FillProgress(self.name, total, shown=self.ranks.is_first)) as progress:
            try:
                for call in todo:
                    if failed.exists() or self.folder.exists():
                        return  # another rank failed, or another job has finished the cache
                    self._encode(call)
                    progress.add(len(call))
            except Exception:
                with suppress(OSError):
                    failed.touch()
                raise

    def _announcement(self, total: int, num_earlier: int) -> str:
        num_done = len(self.distinct.first) - num_earlier - total
        reused = [f"{num_done:,} were done before"] if num_done else []
        reused += [f"{num_earlier:,} are in an earlier cache"] if num_earlier else []
        items = self.distinct.describe(total)
        return (
            f"encoding '{self.name}' of {items} once, into {self.folder}"
            f"{''.join(f'; {text}' for text in reused)}"
        )

    def _encode(self, call: np.ndarray) -> None:  # [n]
        name = self._name_of(call)
        if self.parts.holds(name):
            return  # another rank or job was faster
        content = self.kind.as_input(*self.source.gather(call))
        output = self.encoder.frozen_outputs(content.to(self.ranks.device))
        lengths = output.mask.sum(dim=1).cpu().numpy()
        self.parts.write(name, lengths, output.values[output.mask].cpu().numpy())
        self.encoded += len(call)

    def _put_together(self, earlier: list[EarlierCache], calls: list[np.ndarray]) -> None:
        """Write the cache from earlier caches and parts; it appears whole or not at all."""
        with whole_folder(self.folder) as temporary:
            places = self.distinct.places
            lengths = np.zeros(places.max(initial=-1) + 1, np.int64)
            for cache in earlier:
                lengths[places[cache.rows]] = RaggedArray(cache.folder).lengths[cache.places]
            for call in calls:
                lengths[places[call]] = self.parts.read(self._name_of(call), "lengths")
            shape = (self.encoder.frozen_dim,)
            with closing(RowWriter(temporary, lengths, shape, dtype_of(self.encoder))) as writer:
                for rows, values in self._outputs(earlier, calls):
                    writer.write(places[rows], values)
            if self.distinct.repeat:
                share_rows(temporary, places)
            np.save(temporary / HASHES, self.hashes)
            tokens, width = int(lengths.sum()), self.encoder.frozen_dim
            counts = {"items": self.distinct.num_rows, "tokens": tokens, "width": width}
            about = self.key, self.content, self.encoder, self.kind.modality
            write_about(temporary, *about, counts)

    def _outputs(
        self, earlier: list[EarlierCache], calls: list[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for cache in earlier:
            array = RaggedArray(cache.folder)
            for at in range(0, len(cache.rows), ITEMS_PER_CALL):
                values, mask = array.gather(cache.places[at : at + ITEMS_PER_CALL])
                yield cache.rows[at : at + ITEMS_PER_CALL], values[mask]
        for call in calls:
            yield call, self.parts.read(self._name_of(call), "values")
