"""Tables that begin every epoch anew; runs with them are in `test_optimizer_runs`."""

from pathlib import Path

import pytest
import torch

from embeddings.table_shards import local_shards
from recsys.build import Job, build_job
from recsys.checkpoint.progress import Progress
from recsys.config import Config, EmbeddingSettings, load_config
from recsys.config.checks import validate
from recsys.config.embedding import InitFromSettings, TableSettings
from recsys.data.parquet.order import Stage
from recsys.distributed.ranks import joined_ranks
from recsys.training.table_reset import check_reset, reset_is_due, reset_tables
from tests.datasets import write_dataset
from tests.recsys.command_runs import TINY

WORDS = ["--content", "none", "--device", "cpu", "--embedding.skip", "[]"]
WORDS += ["--embedding.tables.user.frozen", "true"]
WORDS += ["--optimizer.ema_decay", "0.9", "--optimizer.ema_tables", "true"]
ON = EmbeddingSettings(reset_every_epoch=True)


def tables_of(job: Job) -> dict[str, torch.Tensor]:
    return {name: shard.weight.clone() for name, shard in local_shards(job.model)}


def test_trained_tables_begin_anew_with_their_state_and_averages(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with joined_ranks("cpu") as ranks:
        job = build_job(load_config(TINY, WORDS), str(data), ranks)
        before = {name: value.clone() for name, value in job.em3.ranking.state_dict().items()}
        for _, shard in local_shards(job.model):
            for tensor in (shard.weight, *shard.states):
                tensor.detach().fill_(7.0)
        reset_tables(job, epoch=1)
        found = tables_of(job)
        assert (found.pop("user") == 7.0).all()  # frozen
        assert sorted(found) == ["genres", "item"]
        for weight in found.values():
            assert 0.005 < weight.std() < 0.02  # embedding.init_std is 0.01
        for name, shard in local_shards(job.model):
            assert all((state == 0).all() == (name != "user") for state in shard.states)
        averages = job.averages.state_dict() if job.averages is not None else {}
        of_item = averages["embeddings.embeddings.item.weight"].local_shards()  # type: ignore[union-attr]
        assert torch.equal(of_item[0].tensor, found["item"])
        assert all(torch.equal(before[n], v) for n, v in job.em3.ranking.state_dict().items())
        reset_tables(job, epoch=2)
        assert not torch.equal(tables_of(job)["item"], found["item"])
        reset_tables(job, epoch=1)
        assert torch.equal(tables_of(job)["item"], found["item"])  # to the last bit


@pytest.mark.parametrize(
    ("progress", "is_due"),
    [
        (Progress(), False),
        (Progress(epoch=1), True),
        (Progress(epoch=1, batches=1), False),
        (Progress(epoch=1, stages=[Stage(2, 8, 4)]), False),  # on other ranks before
    ],
)
def test_the_first_step_of_a_later_epoch_follows_a_reset(progress: Progress, is_due: bool) -> None:
    assert reset_is_due(Config(embedding=ON), progress) == is_due
    assert not reset_is_due(Config(), progress)


def test_a_reset_that_would_discard_the_rows_of_another_run_is_refused() -> None:
    check_reset(Config(embedding=ON, epochs=3), is_warm=False)
    check_reset(Config(embedding=ON, epochs=1), is_warm=True)
    with pytest.raises(ValueError, match=r"embedding\.reset_every_epoch .*epochs \(3\)"):
        check_reset(Config(embedding=ON, epochs=3), is_warm=True)


def test_a_reset_that_would_discard_pretrained_rows_is_refused() -> None:
    tables = {"user": TableSettings(init_from=InitFromSettings("vectors"), frozen=True)}
    validate(Config(embedding=EmbeddingSettings(reset_every_epoch=True, tables=tables)))
    tables["user"].frozen = False
    with pytest.raises(ValueError, match=r"reset_every_epoch .*tables\.user\.init_from"):
        validate(Config(embedding=EmbeddingSettings(reset_every_epoch=True, tables=tables)))
