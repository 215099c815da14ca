"""Time whole training steps with and without kernels, or with an earlier commit, in turns.

    python -m benchmarks.kernels --out FOLDER
    python -m benchmarks.kernels --out FOLDER --before CLONE

Each variant has a process of one thread. A ratio is the median over rounds of the ratio within a
round. The baseline is the code in CLONE, or else `kernels: torch`.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from benchmarks.dataset import write_dataset
from benchmarks.results import RESULTS, ROOT, Result, require_other_folder, write_result
from benchmarks.settings import A, setting
from benchmarks.timing.steps import Variant

WORKER = Path(__file__).with_name("worker.py")
TORCH, NATIVE, BEFORE = "kernels: torch", "kernels: native", "before"


class Worker:
    """A process that runs the steps of a variant in a clone."""

    def __init__(self, variant: Variant, clone: Path, threads: int) -> None:
        read, write = os.pipe()
        environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(WORKER), str(write), json.dumps(asdict(variant))]
        self.process = subprocess.Popen(
            [*command, str(threads)],
            cwd=clone,
            env=environment,
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=[write],
        )
        os.close(write)
        self.responses = os.fdopen(read)

    def send(self, request: str) -> Any:
        """Send a request and return its response.

        Raises:
            RuntimeError: the process has ended; its error is above.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        response = self.responses.readline()
        if not response:
            raise RuntimeError("a process has ended; its error stands above")
        return json.loads(response)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.responses.close()


def kernel_steps(
    out: Path,
    before: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 1.5,
    threads: int = 1,
    quick: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure each case by turns.

    Args:
        out: folder for the datasets and the encoded items.
        before: clone of an earlier commit that is measured as well.
        only: texts that a case's name must have one of, e.g. '["DLRM", "history 5"]'.
        rounds: number of rounds.
        seconds: the least time of a variant's steps in a round.
        threads: threads of each process.
        quick: tiny sizes, whose figures mean nothing.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    records = []
    for case in cases(out.resolve(), quick):
        if not only or any(text in case.name for text in only):
            records.append(_measured(case, before, rounds, seconds, threads))
            print(json.dumps(records[-1]), flush=True)
    write_result(_result(records), results)


def _measured(
    case: Variant, before: Path | None, rounds: int, seconds: float, threads: int
) -> dict[str, Any]:
    variants = {
        TORCH: (case.changed(case.name, "--kernels", "torch"), ROOT),
        NATIVE: (case.changed(case.name, "--kernels", "native"), ROOT),
    }
    if before is not None:
        variants = {BEFORE: (case, before.resolve()), **variants}
    workers = {kind: Worker(*variant, threads) for kind, variant in variants.items()}
    try:
        steps = {}
        for kind, worker in workers.items():
            steps[kind] = max(2, round(seconds / worker.send("run 4")[-1]))
        times: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(rounds):
            for kind, worker in workers.items():
                times[kind].append(median(worker.send(f"run {steps[kind]}")))
        peaks = {kind: worker.send("peak") for kind, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    base = next(iter(times))
    ratios = {
        kind: [ours / theirs for ours, theirs in zip(times[base], times[kind])] for kind in times
    }
    return {
        "benchmark": "kernel_steps",
        "case": case.name,
        "step_seconds": times,
        "ratios": ratios,
        "peak_bytes": peaks,
        "overrides": case.overrides,
    }


def _result(records: list[dict[str, Any]]) -> Result:
    kinds = list(records[0]["step_seconds"]) if records else []
    columns = ["training step", *(f"{kind}, ms" for kind in kinds)]
    columns += [f"{kind}, x {kinds[0]}" for kind in kinds[1:]]
    columns += [f"{kind}, peak GB" for kind in kinds]
    rows = []
    for record in records:
        row = [record["case"]]
        row += [f"{1e3 * median(record['step_seconds'][kind]):.1f}" for kind in kinds]
        for kind in kinds[1:]:
            ratios = record["ratios"][kind]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            row.append(f"{median(ratios):.2f} {spread}")
        row += [f"{record['peak_bytes'][kind] / 1e9:.2f}" for kind in kinds]
        rows.append(row)

    title = "Training steps with kernels"
    return Result("kernel_steps", title, records, columns, rows)


NUM_SPARSE, NUM_DENSE = 26, 13
HISTORIES = (50, 20, 5)
ID_ONLY = ("--content", "none")
SIMILARITY = ("--content.history.similarity_features", "true")
# DLRM has no dropout in TorchRec.
WIDE = ("--embedding.dim", "16", "--batch_size", "8192", "--ranking.dropout", "0", "--ranking.name")
DIN = (*WIDE, "din", "--ranking.attention_units", "[256,64]")


def cases(out: Path, quick: bool) -> list[Variant]:
    """Write the datasets under `out` if they are missing; return a variant for each case."""
    sized = setting("A", quick)
    data, arguments = sized.prepared(out)
    base = Variant("A, bank_lora", str(sized.recipe), data, arguments)
    small = ("--batch_size", "16") if quick else ()
    variants = [
        base.changed("A, ID-only", *ID_ONLY),
        base,
        base.changed("A, bank_lora, similarity features", *SIMILARITY),
    ]
    ids = Variant("", str(A.recipe), "", ID_ONLY, loaded_batches=4)
    criteo = _write_criteo(out / f"criteo-{quick}", 64 if quick else 65_536, 50 if quick else 10**5)
    name = "DLRM 26 x 100,000 x 16, batch 8192"
    variants.append(ids.changed(name, *WIDE, "dlrm", *small, data=str(criteo)))
    for history in HISTORIES:
        size = replace(sized.size, history=history, text_dim=0, image_dim=0)
        if not quick:
            size = replace(size, num_rows=65_536)
        data = str(write_dataset(out / f"din-{quick}-{history}", size))
        name = f"DIN [256, 64], batch 8192, history {history}"
        variants.append(ids.changed(name, *DIN, *small, data=data))
    return variants


def _write_criteo(folder: Path, num_rows: int, num_embeddings: int) -> Path:
    if (folder / "schema.yaml").exists():
        return folder
    rng = np.random.default_rng(0)
    lines = ["target_item: id_0", "group: id_1", "columns:"]
    kind = f"{{kind: id, num_embeddings: {num_embeddings}}}"
    lines += [f"  id_{column}: {kind}" for column in range(NUM_SPARSE)]
    lines += [f"  dense_{column}: {{kind: dense}}" for column in range(NUM_DENSE)]
    lines += ["  clicked: {kind: label}", "items:", "  id: id_0", "  columns:"]
    for split, rows in (("train", num_rows), ("valid", 64), ("test", 64)):
        columns = {
            f"id_{column}": rng.integers(num_embeddings, size=rows) for column in range(NUM_SPARSE)
        }
        columns |= {
            f"dense_{column}": rng.random(rows).astype(np.float32) for column in range(NUM_DENSE)
        }
        columns["clicked"] = rng.integers(2, size=rows).astype(np.float32)
        _write(folder / split, pa.table(columns))
    _write(folder / "items", pa.table({"id_0": pa.array(np.arange(num_embeddings))}))
    (folder / "schema.yaml").write_text("\n".join(lines) + "\n")
    return folder


def _write(folder: Path, table: pa.Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "part-0.parquet")


if __name__ == "__main__":
    auto_cli(kernel_steps, as_positional=False)
