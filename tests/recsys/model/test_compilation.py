"""Compiled dense parts: the same numbers, the same names, and one graph for all lengths.

Graphs are captured as they always are but run by PyTorch, which takes no compiler; what the
compiler makes of them is tested where tests may take minutes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from recsys.build import Job, build_job
from recsys.distributed.ranks import joined_ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.evaluation.evaluate import fill_bank
from recsys.model.precision import compile_dense_parts, compiled_parts
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import batches_of, dense_gradients, em3_config, ranks_of, table_pieces

CPU = torch.device("cpu")
SIZES = [6, 5, 7, 3]  # impressions of each batch: with them all other lengths differ
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compilation")
    write_dataset(folder / "data")
    return folder


def train(job: Job) -> dict[str, Any]:
    """Some steps and a pass of evaluation, with the graphs there are after each."""
    result: dict[str, Any] = {"logits": [], "graphs": []}
    counters.clear()
    fill_bank(job)
    for index, size in enumerate(SIZES):
        job.model.train()
        _, logits, _ = job.pipeline.progress(iter(batches_of(job, index + 1, size)[-1:]))
        result["logits"].append(logits.detach().clone())
        result["gradients"] = dense_gradients(job.em3)
        job.model.eval()
        with torch.no_grad():
            job.pipeline.progress(iter(batches_of(job, 1, size)))
        result["graphs"].append(counters["stats"]["unique_graphs"])
    require_pipelined(job.model)
    return result | {
        "tables": table_pieces(job),
        "names": list(job.model.state_dict()),
        "breaks": dict(counters["graph_break"]),
    }


def train_both_ways(
    rank: int, world_size: int, folder: Path, precision: Any, backend: str
) -> dict[str, Any]:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    config = em3_config(folder, precision=precision)
    results = {"eager": train(build_job(config, data, ranks))}
    job = build_job(config, data, ranks)
    compile_dense_parts(job.em3, CPU, backend)
    return results | {"compiled": train(job), "parts": set(compiled_parts(job.em3))}


def assert_same_numbers(run: dict[str, Any], tolerance: float) -> None:
    eager, compiled = run["eager"], run["compiled"]
    tolerances: dict[str, Any] = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(compiled["logits"], eager["logits"], **tolerances)
    torch.testing.assert_close(compiled["gradients"], eager["gradients"], **tolerances)
    torch.testing.assert_close(compiled["tables"], eager["tables"], **tolerances)


def test_each_part_is_one_graph_for_all_lengths_with_the_numbers_of_the_part(folder: Path) -> None:
    (captured,) = run_on_ranks(train_both_ways, 1, folder, "fp32", "aot_eager")
    eager, compiled = captured["eager"], captured["compiled"]
    layer = "content.encoders.text.model.encoder.layer.2"  # the only one with adapters
    assert captured["parts"] == {layer, "content.fusion", "ranking.mlp"}
    assert_same_numbers(captured, TOLERANCE)
    assert eager["graphs"][-1] == 0 and compiled["breaks"] == {}
    assert compiled["graphs"][0] >= len(captured["parts"])
    assert set(compiled["graphs"]) == {compiled["graphs"][0]}
    assert compiled["names"] == eager["names"]  # of its state dict


def test_without_a_compiler_a_job_is_refused_before_it_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor_config.cpp, "cxx", (None, "no-such-compiler"))
    message = "compile is .* cpu .*no-such-compiler"
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=message):
        build_job(em3_config(folder, compile=True), str(folder / "data"), ranks)


@pytest.mark.long
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", TOLERANCE), ("bf16", 0.02)])
def test_compiled_code_on_two_ranks_gives_the_numbers_of_pytorch(
    folder: Path, precision: str, tolerance: float
) -> None:
    for run in run_on_ranks(train_both_ways, 2, folder, precision, "inductor"):
        assert_same_numbers(run, tolerance)
