"""Computes the outputs of an encoder's frozen part once per item and keeps them on disk.

Interrupted work continues where it stopped: the file of a finished call is named by its content.
Shapes: N rows of the store, S distinct contents, n rows of a call or to reuse, D output width.
"""

import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recsys.content.encoders.base import ITEMS_PER_GROUP, SHORT_LENGTHS, CacheReport, Encoder
from recsys.content.encoders.identity import weights_digest
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import digest_of
from recsys.data.items.ragged_array import HASHES, RaggedArray, RowWriter, share_rows
from recsys.distributed.log import progress_bar
from recsys.distributed.ranks import Ranks
from recsys.storage.files import atomic_file, atomic_folder

logger = logging.getLogger(__name__)

METADATA_FILE = "about.json"
SECONDS_BETWEEN_LINES = 10.0
LINE = "{n:,} of {total:,} items, {rate_noinv_fmt}, {remaining} left"
ITEMS_PER_CALL = 64
SECONDS_UNTIL_VISIBLE = 120  # network folders appear on other machines with a delay


def distinct_rows(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [N] -> [S], [N]
    """Return the first row of each content, ascending, and each row's index among these, or -1."""
    rows = np.flatnonzero(hashes != b"")
    _, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    order = np.argsort(first)
    indices = np.full(len(hashes), -1)
    indices[rows] = np.argsort(order)[group.reshape(-1)]
    return rows[first[order]], indices


def encoder_key(encoder: Encoder) -> str:
    """Return a hash of frozen weights, settings and batch shapes, without trained weights."""
    dtype = () if encoder.frozen_dtype == torch.float32 else (dtype_name(encoder),)
    shapes = (ITEMS_PER_GROUP, SHORT_LENGTHS, encoder.max_length, *dtype)
    trained = {name for name, value in encoder.named_parameters() if value.requires_grad}
    weights = weights_digest(encoder, excluded=trained)
    return digest_of(weights, encoder.frozen_settings(), shapes)


def dtype_name(encoder: Encoder) -> str:
    """Return the name of the type in which an encoder's cache stores its outputs."""
    return str(encoder.frozen_dtype).removeprefix("torch.")


# A finished cache, rows of the new cache that it holds, and its own rows with the same content.
EarlierCache = tuple[Path, np.ndarray, np.ndarray]  # folder, [n], [n]


def with_progress(calls: list[np.ndarray], name: str, shown: bool) -> Generator[np.ndarray]:
    """Yield the calls, and show progress over items as a bar or, without a bar, as log lines."""
    total, num_done = sum(map(len, calls)), 0
    start = last_line = time.monotonic()
    with progress_bar(total, name, shown, unit=" items", unit_scale=True) as bar:
        for call in calls:
            yield call
            num_done += len(call)
            bar.update(len(call))
            time_now = time.monotonic()
            if bar.disable and shown and time_now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, duration = time_now, time_now - start
                options = {"unit": " items", "bar_format": LINE}
                counts = tqdm.format_meter(num_done, total, duration, **options)
                logger.info(f"encoding '{name}': {counts}")


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
        self.first_rows, self.indices = distinct_rows(self.hashes)
        self.folder = self.cache / f"frozen-{name}-{digest_of(self.content, self.key)}"
        self.chunks = self.cache / f".{self.folder.name}.parts"
        self.num_items, self.encoded = int((self.indices >= 0).sum()), 0

    def run(self) -> None:
        """Encode all missing items and write the cache. A collective."""
        ranks = self.ranks
        self.encoder.to(ranks.device).eval()
        number = ranks.from_first(secrets.randbits(32))  # identifies this job
        failed = self.chunks / f".failed-{number}"
        with ranks.raise_on_all_ranks():
            self.chunks.mkdir(parents=True, exist_ok=True)
            earlier, missing = self._earlier_caches()
            rows = missing[np.argsort(self.source.lengths[missing], kind="stable")]  # by length
            calls = [rows[at : at + ITEMS_PER_CALL] for at in range(0, len(rows), ITEMS_PER_CALL)]
            if ranks.is_first_of_machine:
                self._remove_damaged(calls)
        try:
            with ranks.raise_on_all_ranks(), self._unless_another_job_was_faster():
                order = np.random.default_rng(number).permutation(len(calls))
                order = np.roll(order, -(len(calls) * ranks.rank // ranks.world_size))
                num_earlier = len(self.first_rows) - len(missing)
                self._encode_missing([calls[index] for index in order], num_earlier, failed)
            with ranks.raise_on_all_ranks():
                if ranks.is_first_of_machine and not self.folder.exists():
                    with self._unless_another_job_was_faster():
                        self._assemble(earlier, calls)
            if ranks.is_first_of_machine:
                shutil.rmtree(self.chunks, ignore_errors=True)
        finally:
            failed.unlink(missing_ok=True)

    @contextmanager
    def _unless_another_job_was_faster(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if not self.folder.exists():
                raise

    def _earlier_caches(self) -> tuple[list[EarlierCache], np.ndarray]:
        """Return caches of this encoder, with the rows to read from each, and the missing rows."""
        usable, missing = [], self.first_rows
        for metadata in self.cache.glob(f"frozen-*/{METADATA_FILE}"):
            # Damaged ones, or those being removed, are left out: encoding again is always correct.
            with suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(metadata.read_text())["encoder_key"] == self.key:
                    cached_hashes = np.load(metadata.parent / HASHES, allow_pickle=False)
                    if len(cached_hashes) == len(RaggedArray(metadata.parent)) > 0:
                        usable.append((metadata.stat().st_mtime_ns, metadata.parent, cached_hashes))
        caches = []
        for _, folder, cached_hashes in sorted(usable, key=lambda entry: entry[:2], reverse=True):
            order = np.argsort(cached_hashes, kind="stable")
            match = np.searchsorted(cached_hashes, self.hashes[missing], sorter=order)
            match = order[match.clip(max=len(order) - 1)]
            is_cached = cached_hashes[match] == self.hashes[missing]
            if is_cached.any():
                caches.append((folder, missing[is_cached], match[is_cached]))
            missing = missing[~is_cached]
        return caches, missing

    def _chunk_path(self, call: np.ndarray) -> Path:  # [n]
        return self.chunks / f"{digest_of(self.hashes[call].tobytes())}.npz"

    def _read(self, call: np.ndarray, array: str) -> np.ndarray:  # [n] -> `lengths` or `values`
        path = self._chunk_path(call)
        content = BytesIO(path.read_bytes())
        try:
            with np.load(content, allow_pickle=False) as arrays:
                return arrays[array]
        # Damage to an archive may raise any exception.
        except Exception as error:
            raise ValueError(f"{path}: damaged ({error}); remove it, it is made again") from error

    def _remove_damaged(self, calls: list[np.ndarray]) -> None:
        for call in (call for call in calls if self._chunk_path(call).exists()):
            try:
                self._read(call, "lengths")
                self._read(call, "values")
            except ValueError:
                self._chunk_path(call).unlink(missing_ok=True)

    def _encode_missing(self, calls: list[np.ndarray], num_earlier: int, failed: Path) -> None:
        """Encode the calls that no rank or job has encoded yet; a failure ends all ranks.

        Each rank has its own order, so that ranks and jobs with one folder share the work, and the
        rate averages over short and long texts.
        """
        todo = [call for call in calls if not self._chunk_path(call).exists()]
        if todo:
            logger.info(self._announcement(sum(map(len, todo)), num_earlier))
        with closing(with_progress(todo, self.name, self.ranks.is_first)) as counted:
            try:
                for call in counted:
                    if failed.exists() or self.folder.exists():
                        return  # another rank failed, or another job has finished the cache
                    self._encode(call)
            except Exception:
                with suppress(OSError):
                    failed.touch()
                raise

    def _announcement(self, total: int, num_earlier: int) -> str:
        num_done = len(self.first_rows) - num_earlier - total
        reused = f"; {num_done:,} were done before" if num_done else ""
        reused += f"; {num_earlier:,} are in an earlier cache" if num_earlier else ""
        is_distinct = len(self.first_rows) == self.num_items
        unit = "items" if is_distinct else f"distinct contents of {self.num_items:,} items"
        return f"encoding '{self.name}' of {total:,} {unit} once, into {self.folder}{reused}"

    def _encode(self, call: np.ndarray) -> None:  # [n]
        path = self._chunk_path(call)
        if path.exists():
            return  # another rank or job was faster
        content = self.kind.as_input(*self.source.gather(call))
        output = self.encoder.frozen_outputs(content.to(self.ranks.device))
        lengths = output.mask.sum(dim=1).cpu().numpy()
        values = output.values[output.mask].cpu().numpy()
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(file, lengths=lengths, values=values)
        self.encoded += len(call)

    def _assemble(self, earlier: list[EarlierCache], calls: list[np.ndarray]) -> None:
        """Write the cache from earlier caches and chunks; it appears complete or not at all."""
        with atomic_folder(self.folder) as temporary:
            lengths = np.zeros(len(self.first_rows), np.int64)
            for folder, rows, hits in earlier:
                lengths[self.indices[rows]] = RaggedArray(folder).lengths[hits]
            for call in calls:
                lengths[self.indices[call]] = self._read(call, "lengths")
            shape = (self.encoder.frozen_dim,)
            with closing(RowWriter(temporary, lengths, shape, dtype_name(self.encoder))) as writer:
                for folder, rows, hits in earlier:
                    array = RaggedArray(folder)
                    for at in range(0, len(rows), ITEMS_PER_CALL):
                        block = slice(at, at + ITEMS_PER_CALL)
                        values, mask = array.gather(hits[block])
                        writer.write(self.indices[rows[block]], values[mask])
                for call in calls:
                    writer.write(self.indices[call], self._read(call, "values"))
            share_rows(temporary, self.indices)
            np.save(temporary / HASHES, self.hashes)
            self._write_metadata(temporary / METADATA_FILE, int(lengths.sum()))

    def _write_metadata(self, file: Path, num_tokens: int) -> None:
        modality, identity = self.kind.modality, self.encoder.identity
        packages = ("recsys-em3", "torch")
        metadata = {
            "encoder": modality.encoder or modality.module,
            "revision": modality.revision if identity is None else identity.revision,
            "training": modality.training,
            "pooling": modality.pooling,
            "encoder_key": self.key,
            "content": self.content,
            "dtype": dtype_name(self.encoder),
            "items": self.num_items,
            "tokens": num_tokens,
            "width": self.encoder.frozen_dim,
            "device": str(self.ranks.device),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        file.write_text(json.dumps(metadata, indent=2) + "\n")
