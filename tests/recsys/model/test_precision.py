"""bfloat16 and compiled code in the dense parts give the numbers of float32 to their rounding."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from recsys.build import Job, build_job
from recsys.config import Config, HistorySettings
from recsys.content.branch import HistoryMap
from recsys.content.fusion import ConcatFusion
from recsys.distributed.ranks import joined_ranks
from recsys.distributed.torchrec_internals import require_pipelined
from recsys.evaluation.evaluate import fill_bank
from recsys.model.precision import (
    InBfloat16,
    compile_dense_modules,
    compiled_modules,
    compiles_by_default,
    use_bfloat16,
    uses_tf32,
)
from tests.datasets import write_dataset
from tests.host_waits import gpu_branches
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import (
    TABLE_RATES,
    TABLES,
    batches_of,
    dense_gradients,
    em3_config,
    ranks_of,
    table_shards,
)

# Relative error of what passes some ten matrix products, each rounded by up to 2 ** -9.
CLOSE = 0.03
INNER_LINEARS = ("content.encoders", "content.fusion", "ranking.mlp")


class TypesSeen:
    """Types of what passes the model's parts, and whether autocast is on around the losses."""

    def __init__(self, job: Job) -> None:
        self.linear: dict[str, set[torch.dtype]] = {key: set() for key in INNER_LINEARS}
        self.around: set[torch.dtype] = set()
        self.losses_in_autocast = False
        for name, module in job.em3.named_modules():
            for key in INNER_LINEARS:
                if isinstance(module, nn.Linear) and name.startswith(key):
                    module.register_forward_hook(self._note_linear(key))
        job.em3.losses.register_forward_pre_hook(self._note_losses)

    def _note_linear(self, name: str) -> Any:
        return lambda module, inputs, output: self.linear[name].add(output.dtype)

    def _note_losses(self, module: nn.Module, inputs: Any) -> None:
        logits, ids, content, _ = inputs
        history, _ = content.read_history()
        vectors = [logits, *ids.pooled, ids.target, ids.history, content.target, history]
        self.around |= {vector.dtype for vector in vectors}
        self.losses_in_autocast |= torch.is_autocast_enabled("cpu")


def run_job(job: Job) -> dict[str, Any]:
    """Fills the bank, scores a batch and trains on it."""
    content = job.em3.content
    assert content is not None and content.bank is not None
    types = TypesSeen(job)
    fill_bank(job)
    bank, _ = content.bank.lookup(torch.arange(job.schema.num_items))
    job.model.eval()
    with torch.no_grad():
        _, scored, _ = job.pipeline.progress(iter(batches_of(job, 1, 4)))
    job.model.train()
    old_shards = table_shards(job)
    losses, logits, _ = job.pipeline.progress(iter(batches_of(job, 1, 4)))
    require_pipelined(job.model)
    dense = [p for group in job.dense_optimizer.param_groups for p in group["params"]]
    state = [value for p in dense for value in job.dense_optimizer.state[p].values()]
    shards = [shard for table in table_shards(job).values() for _, shard in table]
    return {
        "bank": bank,
        "scored": scored,
        "logits": logits,
        "loss": losses["loss"],
        "gradient": torch.cat([p.grad.flatten() for p in dense]),
        "tables": {name: moved(old_shards, table_shards(job), name) for name in TABLES},
        "types": {tensor.dtype for tensor in (*dense, *state, *shards, bank, scored, logits)},
        "around": types.around,
        "linear": types.linear,
        "losses_in_autocast": types.losses_in_autocast,
    }


def moved(old_shards: Any, new_shards: Any, name: str) -> Tensor:
    """The gradient of a table under SGD, as far as it lies on this rank."""
    pairs = zip(old_shards[name], new_shards[name], strict=True)
    return torch.cat([(old - new).flatten() for (_, old), (_, new) in pairs]) / TABLE_RATES["sgd"]


def run_in_both(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    configs = {
        precision: em3_config(folder, precision=precision, kernels="torch")
        for precision in ("fp32", "bf16")
    }
    return {name: run_job(build_job(config, data, ranks)) for name, config in configs.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("precision")
    write_dataset(folder / "data")
    return run_on_ranks(run_in_both, 2, folder)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["bank", "scored", "logits", "loss", "gradient"])
def test_bank_predictions_loss_and_gradients_are_close_to_float32_but_not_equal(
    results: Any, name: str
) -> None:
    for rank in results:
        assert 0 < relative_error(rank["bf16"][name], rank["fp32"][name]) < CLOSE


@pytest.mark.parametrize("table", TABLES)
def test_updates_of_tables_are_close_to_those_in_float32(results: Any, table: str) -> None:
    exact, rounded = (
        torch.cat([rank[precision]["tables"][table] for rank in results])
        for precision in ("fp32", "bf16")
    )
    assert 0 < relative_error(rounded, exact) < CLOSE


def test_matrix_products_of_every_dense_part_are_in_bfloat16(results: Any) -> None:
    for rank in results:
        assert rank["bf16"]["linear"] == {name: {torch.bfloat16} for name in INNER_LINEARS}
        assert rank["fp32"]["linear"] == {name: {torch.float32} for name in INNER_LINEARS}


def test_everything_between_the_parts_and_all_that_is_kept_is_float32(results: Any) -> None:
    for rank in results:
        for precision in ("fp32", "bf16"):
            assert rank[precision]["types"] == rank[precision]["around"] == {torch.float32}
            assert not rank[precision]["losses_in_autocast"]


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"precision is bf16, .*Tesla T4"):
        use_bfloat16([nn.Module()], torch.device("cuda"))


def test_on_cpu_the_history_map_stays_in_float32() -> None:
    history_map, fusion = HistoryMap(4, HistorySettings(lora_rank=2)), ConcatFusion(4, 2)
    use_bfloat16([history_map, fusion], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):  # the ranking model reads histories within its own
        assert history_map(torch.randn(3, 4)).dtype == torch.float32
    assert isinstance(fusion, InBfloat16)


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
        "tables": table_shards(job),
        "names": list(job.model.state_dict()),
        "breaks": dict(counters["graph_break"]),
    }


def train_both_ways(
    rank: int, world_size: int, folder: Path, precision: Any, backend: str, on_gpu: bool = False
) -> dict[str, Any]:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    config = em3_config(folder, precision=precision)
    if on_gpu:
        config.kernels = "torch"
    with gpu_branches() if on_gpu else nullcontext():
        results = {"eager": train(build_job(config, data, ranks))}
        job = build_job(config, data, ranks)
        compile_dense_modules(job.em3, CPU, backend)
        return results | {"compiled": train(job), "parts": set(compiled_modules(job.em3))}


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


@pytest.mark.long
def test_on_gpus_training_is_two_graphs_for_all_lengths_with_the_numbers_of_the_model(
    folder: Path,
) -> None:
    """Decomposed and divided into forward and backward as for Inductor, but not compiled by C++."""
    backend = "aot_eager_decomp_partition"
    (captured,) = run_on_ranks(train_both_ways, 1, folder, "fp32", backend, True)
    compiled = captured["compiled"]
    assert_same_numbers(captured, TOLERANCE)
    assert compiled["breaks"] == {}
    # One more where a length of the first batch was that of a weight by chance.
    assert 2 <= compiled["graphs"][1] <= 3
    assert set(compiled["graphs"][1:]) == {compiled["graphs"][1]}
    assert compiled["names"] == captured["eager"]["names"]


def test_by_default_gpus_compile_where_torch_can_and_cpus_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("recsys.model.precision.require_compiler", lambda device: None)
    assert compiles_by_default(torch.device("cuda")) and not compiles_by_default(CPU)

    def refuse(device: torch.device) -> None:
        raise ValueError("no triton")

    monkeypatch.setattr("recsys.model.precision.require_compiler", refuse)
    assert not compiles_by_default(torch.device("cuda"))
    assert "no triton" in caplog.text


def test_without_a_compiler_a_job_is_refused_before_it_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor_config.cpp, "cxx", (None, "no-such-compiler"))
    message = "compile is .* cpu .*no-such-compiler"
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=message):
        build_job(em3_config(folder, compile=True), str(folder / "data"), ranks)


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "tolerance", "backend", "world_size"),
    [
        ("fp32", TOLERANCE, "inductor", 2),
        ("bf16", 0.02, "inductor", 1),
        ("fp32", TOLERANCE, "aot_eager", 2),
    ],
    ids=["parts", "parts in bfloat16", "graphs of GPUs"],
)
def test_compiled_code_gives_the_numbers_of_pytorch(
    folder: Path, precision: str, tolerance: float, backend: str, world_size: int
) -> None:
    on_gpu = backend == "aot_eager"
    for run in run_on_ranks(train_both_ways, world_size, folder, precision, backend, on_gpu):
        assert_same_numbers(run, tolerance)


@pytest.mark.parametrize(
    ("tf32", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        (False, "cuda", False),
        (True, "cpu", True),
    ],
)
def test_tf32_is_chosen_on_gpus_alone(tf32: Any, device: str, expected: bool) -> None:
    assert uses_tf32(Config(tf32=tf32), torch.device(device)) is expected
