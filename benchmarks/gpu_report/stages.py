"""The stages of the report; each is a command with its expected minutes."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_SIZES = (512, 8192, 65536)
PRECISIONS = {
    "fp32": ("--tf32", "false"),
    "tf32": ("--tf32", "true"),
    "bf16": ("--tf32", "true", "--precision", "bf16"),
}
# Models of the speed page by their data: tables of DLRM, or the length of histories.
MODELS = ("dlrm", "din_5", "din_20", "din_50", "setting_a", "hstu_200", "hstu_1000")
# Recipes and backbones whose steps must not wait.
WAITLESS = ("tiny", "id_only", "movielens_sample", "din", "dlrm", "sim", "hstu", "transformer")
GPU_TESTS = (
    "tests/embeddings/test_sharded_training.py",
    "tests/embeddings/test_copies.py",
    "tests/recsys/model/test_distributed_model.py",
    "tests/recsys/model/test_pipeline.py",
    "tests/recsys/model/test_device_steps.py",
    "tests/recsys/training/test_device_runs.py",
    "tests/recsys/test_doctor.py",
    "tests/benchmarks/test_gpu_speed.py",
)


@dataclass(frozen=True)
class Stage:
    """One command of the report; it should take `minutes` on one H100 with 16 cores."""

    name: str
    command: tuple[str, ...]
    minutes: float

    def record(self, out: Path) -> dict[str, Any] | None:
        """Return what an earlier run has left; None if there was none."""
        file = self.record_file(out)
        record: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
        return record

    def record_file(self, out: Path) -> Path:
        return out / "stages" / (self.name.replace("/", "_").replace(" ", "-") + ".json")


def stages(out: Path, device: str = "cuda", quick: bool = False) -> list[Stage]:
    """Return all stages in order: what works, what waits, then how fast it is."""
    data, module = out / "data" / "movielens", "benchmarks.gpu_report"
    options = ["--out", str(out), "--device", device, *(["--quick", "true"] if quick else [])]

    def python(*arguments: str | Path) -> tuple[str, ...]:
        return (sys.executable, "-m", *map(str, arguments))

    train = python(
        *("recsys.cli", "train", "--config", "recsys/recipes/tiny.yaml", "--data", data),
        *("--out", out / "tiny", "--overwrite", "--device", device),
    )
    operator = (sys.executable, "-c", OPERATOR.format(device=device))
    prepare = python("recsys.cli", "prepare", "movielens", "--history-length", "200", "--out", data)
    checks = [
        Stage("doctor", python("recsys.cli", "doctor"), 0.5),
        Stage("operator of FBGEMM", operator, 0.5),
        Stage("data", prepare, 1.0),
        Stage("tiny training", train, 2.0),
    ]
    waits = [
        Stage(f"waits {name}", python(f"{module}.waits", "--name", name, *options), 1.0)
        for name in WAITLESS
    ]
    tests = [
        Stage(f"test {file}", python("pytest", "-m", "gpu", "-n", "0", "-rs", "-q", file), 4.0)
        for file in GPU_TESTS
    ]
    speed = [
        Stage(
            f"speed {model} {precision}",
            python(f"{module}.speed", "--model", model, "--precision", precision, *options),
            3.0,
        )
        for model in MODELS
        for precision in PRECISIONS
    ]
    bare = Stage("speed bare fp32", python(f"{module}.speed", "--model", "bare", *options), 3.0)
    return [*checks, *waits, *tests, bare, *speed]


OPERATOR = """
from recsys.doctor import untrained_table
reason = untrained_table("{device}")
raise SystemExit(reason and "FBGEMM does not train a row on {device}: " + reason)
"""
