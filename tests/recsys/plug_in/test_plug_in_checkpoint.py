"""The page's lines load a DLRM's checkpoint, whatever its optimizers keep: nothing, too."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchrec
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.plug_in import add_content, dlrm_state, load_dlrm
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.plug_in.plug_in_runs import (
    NUM_ITEMS,
    build_dlrm,
    plug_in_settings,
    shard,
    user_batches,
)
from tests.recsys.plug_in.test_plug_in_training import (
    CPU,
    LOADING,
    copied,
    differences,
    train,
    users_state,
)

TABLES = {
    "SGD": torchrec.optim.SGD,
    "Adagrad": torchrec.optim.Adagrad,
    "row-wise Adagrad": RowWiseAdagrad,
}
DENSE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.1),
}
PAIRS = [("SGD", "SGD"), ("Adagrad", "SGD"), ("SGD", "momentum"), ("row-wise Adagrad", "Adam")]
ALONE = [("row-wise Adagrad", "SGD")]  # on a rank without a table no optimizer keeps anything


def states(rank: int, world_size: int, folder: Path, pairs: list[tuple[str, str]]) -> list[Any]:
    """Of each pair: the user's state, that with content after loading it, and both optimizers'."""
    results = []
    for tables, dense in pairs:
        kinds = DENSE[dense], TABLES[tables]
        path = folder / f"{world_size}-{tables}-{dense}"
        torch.manual_seed(0)
        model, optimizer = shard(DLRMTrain(build_dlrm("dlrm")), world_size, *kinds)
        train(TrainPipelineBase(model, optimizer, CPU), user_batches(rank, 2))
        state = users_state(model, optimizer)
        dcp.save(state, checkpoint_id=path)
        saved = copied(state)

        torch.manual_seed(1)
        train_model: Any = add_content(DLRMTrain(build_dlrm("dlrm")), plug_in_settings(folder), CPU)
        model, yours = shard(train_model, world_size, *kinds)
        names = {"model": model, "optimizer": train_model.optimizer(yours)}
        old_state = differences(saved, with_optimizer(copied(dlrm_state(model))))
        names["dense_optimizer"] = yours.optimizers[-1][1]
        exec(LOADING.replace("dlrm_checkpoint", str(path)), names)
        loaded = with_optimizer(copied(dlrm_state(model, names["optimizer"])))
        load_dlrm(model, state, names["optimizer"])  # as it is in memory, empty parts included
        again = with_optimizer(copied(dlrm_state(model, names["optimizer"])))
        results.append((saved, old_state, loaded, again))
    return results


def with_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": {"state": {}}} | state


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("plug_in_checkpoint")
    write_dataset(folder / "data", num_items=NUM_ITEMS)
    by_rank = run_on_ranks(states, 2, folder, PAIRS)
    by_pair = {pair: [rank[index] for rank in by_rank] for index, pair in enumerate(PAIRS)}
    return by_pair | {"4 ranks": [rank[0] for rank in run_on_ranks(states, 4, folder, ALONE)]}


@pytest.mark.parametrize("pair", [*PAIRS, "4 ranks"], ids=str)
def test_a_checkpoint_is_loaded_to_the_bit_whatever_the_optimizers_keep(
    results: Any, pair: Any
) -> None:
    for saved, untrained, loaded, again in results[pair]:
        nonempty = {key: value for key, value in saved["optimizer"]["state"].items() if value}
        saved["optimizer"]["state"] = nonempty
        assert any(name.startswith(".model") for name in untrained)  # the loading changes something
        assert differences(saved, loaded) == []
        assert differences(saved, again) == []
