"""Time whole training steps of the sequence models with histories of 50 and of 1000 items.

    python -m benchmarks.sequences --out FOLDER

Processor time of setting A with and without content, on one thread, beside DIN and SIM. Exits with
1 if a default `hstu` or `transformer` step takes over six times as long with long histories.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, require_other_folder, write_result
from benchmarks.settings import Device, setting
from benchmarks.timing.ranks import silence_advice_to_library_developers
from benchmarks.timing.step_work import wait_for_device
from benchmarks.timing.steps import ProductSteps, Variant
from recsys.distributed.ranks import joined_ranks, keep_freed_memory

HISTORIES, QUICK_HISTORIES = (50, 1000), (2, 6)
MODELS = {
    "hstu": "{name: hstu}",
    "transformer": "{name: transformer}",
    "hstu, 256 recent items": "{name: hstu, recent_items: 256}",
    "transformer, 256 recent items": "{name: transformer, recent_items: 256}",
    "din": "{name: din}",
    "sim": "{name: sim}",
}
AIM = 6.0
WITH_AIM = ("hstu", "transformer")
WARM_UP = 2
SMALL = {"num_rows": 4096, "num_items": 20_000, "num_users": 10_000}


@dataclass(frozen=True)
class Growth:
    """Milliseconds of a step with short and with long histories, medians over rounds."""

    model: str
    content: bool
    milliseconds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.milliseconds[1] / self.milliseconds[0]

    @property
    def passes(self) -> bool | None:
        return self.ratio <= AIM if self.model in WITH_AIM else None


def variants_of(
    out: Path,
    batch_size: int,
    content: bool,
    models: list[str],
    quick: bool,
    device: Device = "cpu",
) -> dict[tuple[str, int], Variant]:
    """Return the variants of each model, by its name and the length of histories."""
    variants = {}
    for history in QUICK_HISTORIES if quick else HISTORIES:
        sizes = {} if quick else SMALL
        sized = setting("A", quick).with_data(history=history, **sizes)
        data, arguments = sized.prepared(out, device)
        if quick:  # without settings of the default backbone
            arguments = ("--embedding.dim", "16", "--content.dim", "16", "--contrastive.dim", "16")
            arguments += ("--cache", str(out / "cache"), "--device", device)
        arguments = (*arguments, "--batch_size", str(batch_size))
        arguments += () if content else ("--content", "none")
        for model in models:
            ranking = ("--ranking", MODELS[model])
            recipe = str(sized.recipe)
            variants[model, history] = Variant(
                f"{model} {history}", recipe, data, (*arguments, *ranking), loaded_batches=4
            )
    return variants


def growths(variants: dict[tuple[str, int], Variant], content: bool, rounds: int) -> list[Growth]:
    """Measure the variants in turns."""
    device = next(iter(variants.values())).config().device
    clock = time.process_time if device == "cpu" else time.perf_counter
    with joined_ranks(device) as ranks:
        steps = {key: ProductSteps(variant, ranks) for key, variant in variants.items()}
        times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
        for number in range(-WARM_UP, rounds):
            for key, variant_steps in steps.items():
                start = clock()
                variant_steps.step()
                wait_for_device()
                if number >= 0:
                    times[key].append(1e3 * (clock() - start))
    short, long = sorted({history for _, history in times})
    medians = {key: float(np.median(values)) for key, values in times.items()}
    models = dict.fromkeys(model for model, _ in times)
    return [
        Growth(model, content, (medians[model, short], medians[model, long])) for model in models
    ]


def sequences(
    out: Path,
    batch_size: int = 256,
    rounds: int = 20,
    only: list[str] | None = None,
    device: Device = "cpu",
    quick: bool = False,
    results: Path = RESULTS,
) -> bool:
    """Measure the models and return whether the aims are reached.

    Args:
        out: folder for the datasets and the encoded items.
        batch_size: rows of a step.
        rounds: steps of each variant that count.
        only: names of models; default: all.
        device: cpu, or cuda for a GPU per rank.
        quick: tiny sizes, whose figures mean nothing.
        results: folder for the figures.
    """
    require_other_folder(quick, results)
    unknown = sorted(set(only or []) - set(MODELS))
    if unknown:
        raise ValueError(f"--only: no model {unknown}; choose some of {list(MODELS)}")
    torch.set_num_threads(1)
    keep_freed_memory()
    silence_advice_to_library_developers()
    measured = [
        growth
        for content in (False, True)
        for growth in growths(
            variants_of(out, batch_size, content, only or list(MODELS), quick, device),
            content,
            rounds,
        )
    ]
    write_result(_result(measured, batch_size, QUICK_HISTORIES if quick else HISTORIES), results)
    return all(growth.passes is not False for growth in measured)


def _result(measured: list[Growth], batch_size: int, histories: tuple[int, int]) -> Result:
    short, long = histories
    verdicts = {True: "reached", False: "missed", None: ""}
    rows = [
        [
            growth.model,
            "content" if growth.content else "ID only",
            *(f"{duration:.1f}" for duration in growth.milliseconds),
            f"{growth.ratio:.2f}",
            "" if growth.passes is None else f"{AIM:g}",
            verdicts[growth.passes],
        ]
        for growth in measured
    ]

    return Result(
        name="sequences",
        title="Sequence models: a step by length of history",
        records=[
            {"benchmark": "sequences", **vars(growth), "ratio": growth.ratio} for growth in measured
        ],
        columns=[
            "model",
            "",
            f"history {short}, ms",
            f"history {long}, ms",
            "x",
            "aim, at most",
            "",
        ],
        rows=rows,
        reading=[
            f"Steps of {batch_size} rows, forward, backward and optimizers; medians of the time of "
            "the processor. Every history has the full length."
        ],
    )


if __name__ == "__main__":
    sys.exit(0 if auto_cli(sequences, as_positional=False) else 1)
