"""Checkpoints of a run by torch.distributed.checkpoint: the state of steps, and the best model."""

import logging
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.serialization import config as serialization

from embeddings.table_state import State
from recsys.build import Job
from recsys.checkpoint import files
from recsys.checkpoint.compatibility import check_config, check_equal
from recsys.checkpoint.item_content import encode_changed_items, item_content_digest
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.reader import SafeFileSystemReader, readable_failure
from recsys.checkpoint.state import (
    TrainingState,
    copy_of,
    describe_not_finite,
    finish_loading_bank,
    frozen_digest,
    model_state,
    num_bytes,
)
from recsys.config import to_plain
from recsys.data.row_source import Stage
from recsys.distributed.ranks import Ranks
from recsys.storage.files import flush, recover_folder, replace_folder
from recsys.storage.manifest import describe_all, write_signed

logger = logging.getLogger(__name__)

COPY_SHARE = 0.5  # largest share of the free memory for a copy to write asynchronously
MAX_FAILURES = 3  # failed writes in a row that end the job


class Checkpoints:
    """The checkpoints of a run in training. All methods are collectives.

    `data` is the fingerprint of the training rows; `writers` has a group for the writer's thread.
    """

    def __init__(self, job: Job, run: Path, data: str, writers: Ranks | None = None) -> None:
        self.job, self.data, self.folder = job, data, run / "checkpoints"
        self.frozen, self.items = frozen_digest(job), item_content_digest(job)
        self._damaged: list[Path] = []
        # Writing overlaps with steps, so its collectives must not mix with those of the steps.
        self._ranks, self._owns_group = writers or job.ranks.with_new_group(), writers is None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Future[None], Path] | None = None
        self._failures = 0
        self._copies: bool | None = None  # whether the state is copied before it is written

    def save(self, progress: Progress, wait: bool = False) -> None:
        """Save the whole state; return when later steps can no longer change what is written.

        That is once the state is copied or, without a copy, once files are written but not synced.
        A value that is not finite is a ValueError, as is a failed write: with `wait`, or the third.
        """
        self.wait()
        folder = files.folder_of_step(self.folder, progress.steps)
        state = TrainingState(self.job).state_dict()
        self.require_finite(progress, state)
        if wait or self.job.config.checkpoint.asynchronous == "false":
            self._start(state, folder, progress)
            self.wait(strict=wait)
        elif self._is_copied(state):
            self._start(copy_of(state, self.job), folder, progress)
        else:
            self._start(state, folder, progress).wait()

    def save_best(self, progress: Progress) -> None:
        """Save the model as the best so far; a failure is a ValueError."""
        self.wait()
        self.require_finite(progress, state := model_state(self.job))
        self._start(state, self.folder / files.BEST, progress)
        self.wait(strict=True)

    def require_finite(self, progress: Progress, state: State | None = None) -> None:
        """Raise a ValueError on every rank if a value of the state is not finite. A collective."""
        state = state or model_state(self.job)
        parameters = {name for name, _ in self.job.em3.named_parameters()}
        with self.job.ranks.raise_on_all_ranks():
            if (fault := describe_not_finite(state, parameters)) is not None:
                raise ValueError(
                    f"{fault}, after step {progress.steps}, which is not saved; lower the learning "
                    "rates, or set optimizer.clip_norm. The last good checkpoint is "
                    f"{self.last_good}"
                )

    def wait(self, strict: bool = False) -> None:
        """Wait for the write in progress; its failure is a ValueError if `strict` or the third."""
        if self._pending is None:
            return
        (future, folder), self._pending = self._pending, None
        if (error := future.exception()) is None:
            self._failures = 0
            return
        self._failures += 1
        text = f"{folder}: the checkpoint could not be written ({error}); make room or fix storage"
        if strict or self._failures >= MAX_FAILURES:
            raise ValueError(text) from error
        if self.job.ranks.is_first:
            last_good = self.last_good
            logger.warning("%s. Training goes on; the last good checkpoint is %s", text, last_good)

    def close(self) -> None:
        """Wait for the last write, and end the writer with its group."""
        self.wait()
        self._writer.shutdown()
        if self._owns_group:
            dist.destroy_process_group(self._ranks.custom_group)

    @property
    def last_good(self) -> Path | None:
        """Checkpoint from which the run would continue now; waits for a write in progress."""
        if self._pending is not None:
            wait([self._pending[0]])
        intact = (path for path in files.folders_by_age(self.folder) if path not in self._damaged)
        return next(intact, None)

    def _is_copied(self, state: State) -> bool:
        """Decide once, by setting and memory, whether the state is copied first. A collective."""
        setting, ranks = self.job.config.checkpoint.asynchronous, self.job.ranks
        if self._copies is None:
            sizes = torch.tensor([num_bytes(state), -psutil.virtual_memory().available])
            dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=ranks.group)
            copy_bytes, free_bytes = int(sizes[0]) * ranks.local_world_size, -int(sizes[1])
            # In host memory a copy takes as long as writing, which the page cache absorbs.
            fits = ranks.device.type != "cpu" and copy_bytes <= COPY_SHARE * free_bytes
            self._copies = setting == "true" or fits
            logger.info(
                f"checkpoints: {num_bytes(state) / 2**20:,.1f} MB on rank 0, written "
                f"{'from' if self._copies else 'without'} a copy (setting {setting}; a copy takes "
                f"{copy_bytes / 2**30:.1f} GB of {free_bytes / 2**30:.1f} GB free)"
            )
        return self._copies

    def _start(self, state: State, folder: Path, progress: Progress) -> threading.Event:
        """Begin to write a state; return an event that is set once the state has been read."""
        manifest = {
            "step": progress.steps,
            "progress": asdict(progress),
            "world_size": self.job.ranks.world_size,
            "config": to_plain(self.job.config),
            "data": self.data,
            "rows": self.job.train_folder,
            "frozen_weights": self.frozen,
            "items": self.items,
            "plan": self.job.plan,
        }
        is_read = threading.Event()
        self._pending = self._writer.submit(self._write, state, folder, manifest, is_read), folder
        return is_read

    def _write(
        self, state: State, folder: Path, manifest: dict[str, Any], is_read: threading.Event
    ) -> None:
        """Write a checkpoint, in the writer's thread on every rank. A collective."""
        ranks, partial = self._ranks, folder.with_name(f".{folder.name}.partial")
        try:
            with ranks.raise_on_all_ranks():
                if ranks.is_first:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
            with ranks.raise_on_all_ranks(), readable_failure():
                writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=False)
                # The manifest has hashes; checksums take two thirds of the time training waits.
                with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                    dcp.save(state, storage_writer=writer, process_group=ranks.group)
            is_read.set()
            with ranks.raise_on_all_ranks():
                local_files = sorted(partial.glob(f"__{ranks.rank}_*"))
                local_files += [partial / ".metadata"] if ranks.is_first else []
                for file in local_files:
                    flush(file)
                local = describe_all(partial, local_files)
            entries = {name: entry for rank in ranks.gather(local) for name, entry in rank.items()}
            with ranks.raise_on_all_ranks():
                if ranks.is_first:
                    run_files = files.run_file_hashes(folder.parents[1])
                    manifest |= {"kept": run_files, "files": entries, "format": files.FORMAT}
                    write_signed(partial / files.MANIFEST, manifest)
                    replace_folder(partial, folder)
                    if folder.name != files.BEST:
                        files.prune(folder, self.job.config.checkpoint.keep)
        except Exception:
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            is_read.set()

    @torch.no_grad()
    def restore(self) -> Progress | None:
        """Load the newest complete checkpoint, in place; None without checkpoints. A collective.

        Another model, other data, or damage of all checkpoints is a ValueError.
        """
        ranks, faults = self.job.ranks, []
        for folder in ranks.on_first(files.folders_to_continue, self.folder):
            try:
                manifest = files.checked_manifest(folder, ranks)
            except (ValueError, OSError, RuntimeError) as error:
                faults.append(str(error))
                self._damaged.append(folder)
                if ranks.is_first:
                    logger.warning("checkpoint %s is damaged and left out: %s", folder, error)
                continue
            check_config(manifest["config"], self.job.config, str(folder))
            check_equal("the training data", manifest["data"], self.data, str(folder))
            check_equal("frozen weights", manifest["frozen_weights"], self.frozen, str(folder))
            ranks.on_first(files.check_run_files, folder, manifest)
            training = TrainingState(self.job)
            with ranks.raise_on_all_ranks(), readable_failure():
                reader = SafeFileSystemReader(folder)
                state = training.state_dict(reader.entries)
                dcp.load(state, storage_reader=reader, process_group=ranks.group)
            training.finish_loading()
            is_best = folder.name == files.BEST
            progress = self._continued(manifest, is_best)
            if is_best:
                logger.warning("%s has no state of the optimizers, which begin anew", folder)
            encode_changed_items(self.job, self.folder.parent, manifest)
            return progress
        if faults:
            raise ValueError(
                f"{self.folder}: no checkpoint is whole ({'; '.join(faults)}); bring one back, or "
                "start anew with --overwrite"
            )
        return None

    def _continued(self, manifest: dict[str, Any], is_best: bool) -> Progress:
        job, ranks, config = self.job, self.job.ranks, manifest["config"]
        progress = Progress.from_json(manifest["progress"])
        progress.validations += is_best  # counts the one that chose this model
        stored_stage = Stage(manifest["world_size"], config["batch_size"], progress.batches)
        current = Stage(ranks.world_size, job.config.batch_size, progress.batches)
        num_stored, num_current = config["validations_per_epoch"], job.config.validations_per_epoch
        if progress.batches and (stored_stage != current or num_stored != num_current):
            progress.stages.append(stored_stage)
            progress.batches = 0
        if num_stored != num_current:  # parts whose rows are read are empty now
            progress.validations = num_current if progress.validations == num_stored else 0
        if stored_stage.world_size != ranks.world_size:
            torch.manual_seed(job.config.seed + 1 + ranks.rank + 1000003 * progress.steps)
        job.set_step(progress.age, progress.dense_steps)
        job.model.fused_optimizer.set_optimizer_step(progress.table_steps)
        return progress


@torch.no_grad()
def load_best(job: Job, run: Path) -> dict[str, Any]:
    """Load the best model in place or raise a ValueError; return its manifest. A collective."""
    folder, ranks = run / "checkpoints" / files.BEST, job.ranks
    ranks.on_first(recover_folder, folder)
    with ranks.raise_on_all_ranks():
        if not folder.is_dir():
            raise ValueError(f"{folder}: no checkpoint; train with `--out {run}` first")
    manifest = files.checked_manifest(folder, ranks)
    ranks.on_first(files.check_run_files, folder, manifest)
    with ranks.raise_on_all_ranks():
        reader = SafeFileSystemReader(folder)
        state = model_state(job, reader.entries)
        try:
            if differing := sorted(reader.entries.keys() ^ state.keys()):
                raise ValueError(f"{len(differing)} tensors, as {differing[0]}, are in one only")
            check_config(manifest["config"], job.config, str(folder))
            frozen = manifest["frozen_weights"]
            check_equal("frozen weights", frozen, frozen_digest(job), str(folder))
            dcp.load(state, storage_reader=reader)
        except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{folder}: the checkpoint does not fit the model of {run}/config.yaml: {error}"
            ) from error
    finish_loading_bank(job)
    encode_changed_items(job, run, manifest)
    return manifest
