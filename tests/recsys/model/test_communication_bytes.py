"""16-bit communication is set in the configuration and travels in place of floats.

Ids travel as integers and dense gradients in an all_reduce, both untouched.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from recsys.build import build_job
from recsys.config import CommunicationSettings, EmbeddingSettings
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, em3_config, ranks_of

SHARDINGS = ("row_wise", "table_wise")
CASES = [
    (sharding, forward, backward)
    for sharding in SHARDINGS
    for forward, backward in [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "fp16")]
]
# The argument with the tensor that a rank sends parts of.
OPERATIONS = {
    "c10d::alltoall_base_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "c10d::_allgather_base_": 1,
}
TYPE_IN_TRACE = {"fp16": "c10::Half", "bf16": "c10::BFloat16"}

by_sharding = pytest.mark.parametrize("sharding", SHARDINGS)


def bytes_of_steps(rank: int, world_size: int, folder: Path) -> dict[Any, Counter[str]]:
    return {case: _bytes_of_step(rank, world_size, folder, *case) for case in CASES}


def _bytes_of_step(
    rank: int, world_size: int, folder: Path, sharding: Any, forward: Any, backward: Any
) -> Counter[str]:
    """Numbers in collectives by type, without those of dense gradients."""
    communication = CommunicationSettings(forward, backward)
    tables = EmbeddingSettings(16, sharding, "sgd", communication=communication)
    config = em3_config(folder, embedding=tables)
    job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
    (batch,) = batches_of(job, 1, 4)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss, _ = job.model(batch)
        loss.backward()
        job.ranks.gather(None)  # gloo notes the end of one when it begins the next
    path = folder / f"{rank}.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    sent: Counter[str] = Counter()
    for event in events:
        if (argument := OPERATIONS.get(event["name"])) is not None:
            type_name = event["args"]["Input type"][argument]
            sent[type_name] += math.prod(event["args"]["Input Dims"][argument])
    return sent


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bytes")
    write_dataset(folder / "data")
    return run_on_ranks(bytes_of_steps, 2, folder)


@by_sharding
@pytest.mark.parametrize(("forward", "backward"), [("bf16", "fp32"), ("fp32", "fp16")])
def test_vectors_of_one_direction_are_rounded_and_all_else_is_the_same(
    sent: Any, sharding: str, forward: str, backward: str
) -> None:
    type_name = TYPE_IN_TRACE[backward if forward == "fp32" else forward]
    for rank in sent:
        exact, rounded = rank[sharding, "fp32", "fp32"], rank[sharding, forward, backward]
        assert rounded[type_name] > 0
        # Floats that are no vectors of tables (memory bank, contrastive loss) stay as they are.
        assert exact["float"] == rounded["float"] + rounded[type_name]
        integers = exact.keys() - {"float"}
        assert {"long int", "int"} <= integers and exact[type_name] == 0
        assert all(exact[name] == rounded[name] for name in integers)
