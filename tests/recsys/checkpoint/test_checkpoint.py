"""What the best model's checkpoint holds; that it is whole, or refused, or still the old one."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.table_state import table_weights
from recsys.build import Job, build_job
from recsys.checkpoint.compatibility import check_config
from recsys.checkpoint.files import folder_of_step, folders_by_age, prune
from recsys.checkpoint.manager import Checkpoints, load_best
from recsys.checkpoint.progress import Progress
from recsys.checkpoint.state import TrainingState
from recsys.config import ContentSettings, config_of_plain, load_config, to_plain
from recsys.distributed.log import configure_logging
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import evaluate
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, tiny_config
from tests.recsys.em3_runs import ranks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with joined_ranks("cpu") as ranks:
        train(tiny(folder), str(folder / "data"), folder / "run", ranks)
    return folder / "run"


def tiny(folder: Path, *argv: str) -> Any:
    return tiny_config(folder / "cache", "--device", "cpu", *argv)


def job_of(folder: Path, ranks: Ranks, *argv: str) -> Job:
    return build_job(tiny(folder, *argv), str(folder / "data"), ranks)


def test_what_trains_is_stored_and_the_frozen_base_of_the_encoder_is_not(run: Path) -> None:
    metadata = dcp.FileSystemReader(run / "checkpoints" / "best").read_metadata()
    names = list(metadata.state_dict_metadata)
    encoders = [name for name in names if "content.encoders" in name]
    assert len(encoders) == 4  # A and B of query and value in one layer
    assert all("lora_" in name for name in encoders)
    for prefix in ("embeddings.item", "embedding_bags.genres", "content.fusion.", "ranking.mlp."):
        assert any(prefix in name for name in names), prefix
    assert "bank" in names


def test_a_missing_checkpoint_is_told_with_its_folder(folder: Path, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"best: no checkpoint"):
        load_best(job_of(folder, ranks), tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["--content", "none"],
        ["--content.fusion.num_heads", "4"],  # of the same shapes
    ],
)
def test_the_checkpoint_of_another_model_is_refused(
    folder: Path, run: Path, argv: list[str]
) -> None:
    with (
        joined_ranks("cpu") as ranks,
        pytest.raises(ValueError, match=r"best: .*config\.yaml"),
    ):
        load_best(job_of(folder, ranks, *argv), run)


def test_modalities_in_another_order_are_another_model() -> None:
    plain = to_plain(load_config(TINY, ["--content.modalities.b", "{kind: feature, column: b}"]))
    config = config_of_plain(plain)
    check_config(plain, config, "RUN")
    assert isinstance(config.content, ContentSettings)
    config.content.modalities = dict(reversed(config.content.modalities.items()))

    with pytest.raises(ValueError, match=r"modalities \(checkpoint: \['text', 'b'\], now: \['b'"):
        check_config(plain, config, "RUN")


def save_best(job: Job, run: Path, step: int = 0) -> None:
    checkpoints = Checkpoints(job, run, "data")
    try:
        checkpoints.save_best(Progress(steps=step))
    finally:
        checkpoints.close()


def half_written(*_: Any, storage_writer: Any, **__: Any) -> None:
    """What a full disk leaves of `dcp.save`."""
    Path(storage_writer.path, "__0_0.distcp").write_bytes(b"half")
    raise OSError("No space left on device")


def test_a_failure_while_writing_keeps_the_old_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined_ranks("cpu") as ranks:
        job = job_of(folder, ranks)
        save_best(job, tmp_path)
        weight = job.em3.ranking.mlp[-1].weight  # type: ignore[union-attr, index]
        saved = weight.detach().clone()
        with torch.no_grad():
            weight += 1  # type: ignore[operator]
        with monkeypatch.context() as patch:
            patch.setattr(dcp, "save", half_written)
            with pytest.raises(ValueError, match=r"best: .*\(No space"):
                save_best(job, tmp_path)
        load_best(job, tmp_path)
        assert torch.equal(weight, saved)  # type: ignore[arg-type]
        save_best(job, tmp_path)  # what the failure left behind is in nobody's way
        checkpoints = tmp_path / "checkpoints"
        assert [path.name for path in checkpoints.iterdir()] == ["best"]
        (checkpoints / "best").rename(checkpoints / ".best.old")  # killed between two renames
        load_best(job, tmp_path)


def test_what_later_steps_change_is_not_in_an_asynchronous_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    with joined_ranks("cpu") as ranks:
        job = job_of(folder, ranks, "--checkpoint.asynchronous", "true")
        weight = job.em3.ranking.mlp[-1].weight  # type: ignore[union-attr, index]
        table = next(iter(table_weights(job.model).values())).local_shards()[0].tensor
        saved = weight.detach().clone(), table.clone()
        checkpoints = Checkpoints(job, tmp_path, "data")
        gate = threading.Event()
        checkpoints._writer.submit(gate.wait)  # the write starts after the change
        checkpoints.save(Progress(steps=1))
        with torch.no_grad():
            weight += 1  # type: ignore[operator]
            table += 1
        gate.set()
        checkpoints.close()
        other = Checkpoints(job, tmp_path, "data")
        assert other.restore() is not None
        other.close()
        assert torch.equal(weight, saved[0])  # type: ignore[arg-type]
        assert torch.equal(table, saved[1])


def test_a_checkpoint_is_finished_during_later_steps_without_a_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, flushed = threading.Event(), list[str]()

    def late_flush(path: Path) -> None:
        assert gate.wait(60)
        flushed.append(path.name)

    monkeypatch.setattr("recsys.checkpoint.manager.flush", late_flush)
    monkeypatch.setattr("recsys.checkpoint.manager.copy_of", None)  # not called
    with joined_ranks("cpu") as ranks:
        job = job_of(folder, ranks)
        weight = job.em3.ranking.mlp[-1].weight  # type: ignore[union-attr, index]
        table = next(iter(table_weights(job.model).values())).local_shards()[0].tensor
        saved = weight.detach().clone(), table.clone()
        checkpoints = Checkpoints(job, tmp_path, "data")
        checkpoints.save(Progress(steps=1))
        assert not folder_of_step(checkpoints.folder, 1).exists()  # no name before the disk has it
        with torch.no_grad():
            weight += 1  # type: ignore[operator]
            table += 1
        gate.set()
        checkpoints.close()
        assert sorted(flushed) == [".metadata", "__0_0.distcp"]
        other = Checkpoints(job, tmp_path, "data")
        assert other.restore() is not None
        other.close()
        assert torch.equal(weight, saved[0])  # type: ignore[arg-type]
        assert torch.equal(table, saved[1])


def test_the_last_checkpoints_are_kept_and_no_more(folder: Path, tmp_path: Path) -> None:
    with joined_ranks("cpu") as ranks:
        job = job_of(folder, ranks, "--checkpoint.keep", "2")
        checkpoints = Checkpoints(job, tmp_path, "data")
        for step in (1, 2, 3):
            checkpoints.save(Progress(steps=step))
        checkpoints.save_best(Progress(steps=1))
        checkpoints.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "step-00000002", "step-00000003"]


def test_folders_are_ordered_by_their_step_however_many_digits_it_has(tmp_path: Path) -> None:
    for step in (10**8, 10**8 - 1, 10**9, 5):
        folder_of_step(tmp_path, step).mkdir()
    (tmp_path / "step-of-mine").mkdir()
    steps = [path.name.removeprefix("step-") for path in folders_by_age(tmp_path)]
    assert [int(step) for step in steps] == [10**9, 10**8, 10**8 - 1, 5]
    prune(folder_of_step(tmp_path, 10**8), keep=1)
    remaining = {path.name for path in tmp_path.iterdir()}
    assert remaining == {"step-100000000", "step-1000000000", "step-of-mine"}


def test_a_result_that_cannot_be_stored_is_printed_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("predict.tempfile.TemporaryFile", "evaluate.write_scores", "predict.atomic_write"):
        monkeypatch.setattr(f"recsys.evaluation.{name}", read_only, raising=False)
    configure_logging()
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=r"evaluation_valid\.json"):
        evaluate(run, None, "valid", ranks, "cpu")
    assert "logloss" in capfd.readouterr().out


def poison(job: Job, name: str) -> None:
    """Make one value of the state not finite, on the last rank alone. A collective."""
    state = TrainingState(job).state_dict()
    value = next(value for key, value in state.items() if name in key)
    tensor = value.local_shards()[-1].tensor if isinstance(value, ShardedTensor) else value
    if job.ranks.rank == job.ranks.world_size - 1:
        tensor.detach().view(-1)[-1] = float("inf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embeddings.item.weight", r"table 'item'.*first 29\b"),
        ("ranking.mlp", r"ranking\.mlp\S+"),
        ("optimizer.tables.", r"optimizer\.tables\.\S+"),
    ],
)
def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(
    folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    with joined_ranks("cpu") as ranks:
        job = job_of(folder, ranks)
        checkpoints = Checkpoints(job, tmp_path, "data")
        checkpoints.save(Progress(steps=1), wait=True)
        checkpoints.save_best(Progress(steps=1))
        poison(job, name)
        good = r"after step 2.*checkpoints/step-00000001"
        with pytest.raises(ValueError, match=f"{message}.*{good}"):
            checkpoints.save(Progress(steps=2))
        if not name.startswith("optimizer"):
            for naming in (checkpoints.save_best, checkpoints.require_finite):
                with pytest.raises(ValueError, match=f"{message}.*{good}"):
                    naming(Progress(steps=2))
        checkpoints.close()
        assert load_best(job, tmp_path)["step"] == 1
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "step-00000001"]


def save_poisoned(rank: int, world_size: int, folder: Path) -> str:
    """The last rank alone has a row that is not finite; the error that this rank sees."""
    argv = ("--content", "none", "--embedding.sharding", "row_wise")
    job = build_job(tiny(folder, *argv), str(folder / "data"), ranks_of(rank, world_size))
    checkpoints = Checkpoints(job, folder / "poisoned", "data")
    poison(job, "embeddings.item.weight")
    try:
        checkpoints.save(Progress(steps=1), wait=True)
    except ValueError as error:
        return str(error)
    finally:
        checkpoints.close()
    return ""


def test_a_row_that_is_not_finite_on_one_rank_ends_all_of_them(folder: Path) -> None:
    errors = run_on_ranks(save_poisoned, 2, folder)
    assert all("table 'item'" in error and "first 29" in error for error in errors)
    assert not (folder / "poisoned" / "checkpoints").exists()


def test_a_full_disk_ends_the_job_only_when_it_stays_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    configure_logging()
    with joined_ranks("cpu") as ranks:
        checkpoints = Checkpoints(job_of(folder, ranks), tmp_path, "data")
        checkpoints.save(Progress(steps=1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(dcp, "save", half_written)
            checkpoints.save(Progress(steps=2))
            checkpoints.wait()
            output = capfd.readouterr().out
            assert "step-00000002: " in output and "(No space" in output
            assert f" {tmp_path}/checkpoints/step-00000001" in output
            checkpoints.save(Progress(steps=3))
            checkpoints.save(Progress(steps=4))
            with pytest.raises(ValueError, match=r"step-00000004: "):
                checkpoints.wait()
        checkpoints.save(Progress(steps=5), wait=True)
        checkpoints.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000005"]
