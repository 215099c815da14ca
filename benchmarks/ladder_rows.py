"""The rows of the ladders: each row names another row and makes one change to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.timing.steps import Variant


@dataclass(frozen=True)
class Row:
    """One rung; `base` is the name of the row it changes, None for the first."""

    name: str
    base: str | None
    what: str  # description, a sentence
    variant: Variant


class _Rows:
    """Rows in order, each made from an earlier one."""

    def __init__(self, first: Variant, what: str) -> None:
        self.rows = [Row(first.name, None, what, first)]

    def add(self, name: str, what: str, *overrides: str, base: str = "", **fields: Any) -> None:
        """Add a row that changes the last one, or `base`."""
        named = {row.name: row for row in self.rows}
        before = named[base] if base else self.rows[-1]
        variant = before.variant.changed(name, *overrides, **fields)
        self.rows.append(Row(name, before.name, what, variant))


def rows_of(setting: str, recipe: str, data: str, overrides: tuple[str, ...]) -> list[Row]:
    """Return the ladder of setting A or B."""
    variant = Variant("first", recipe, data, (*overrides, "--num_workers", "0"))
    return rows_of_a(variant) if setting == "A" else rows_of_b(variant)


def rows_of_a(variant: Variant) -> list[Row]:
    """Return rows with stored features: first less work per step, then work beside the step."""
    mode, dedup = "--content.history.mode", "--embedding.index_dedup"
    first = variant.changed("plain PyTorch", mode, "full", dedup, "false", kind="plain")
    rows = _Rows(first, "Every item of every padded history is encoded, on loaded batches.")
    rows.add(
        "items encoded once",
        "TorchRec's tables and pipeline, and each distinct item of a batch encoded once.",
        kind="product",
    )
    rows.add("IDs looked up once", "Each distinct ID of the histories too.", dedup, "true")
    rows.add(
        "memory bank",
        "Histories are read from the bank instead of encoded; their map is dense.",
        *(mode, "bank_dense"),
    )
    rows.add("LoRA map", "The history map is frozen but for a low rank.", mode, "bank_lora")
    rows.add(
        "batches from files", "Parquet is read and batches are built in the step.", loaded_batches=0
    )
    rows.add("prefetch", "Both happen in threads beside it.", "--num_workers", "1")
    types = ("--embedding.communication.forward", "--embedding.communication.backward")
    rows.add("2 ranks", "Two processes of one thread, the batch of each as before.", ranks=2)
    rows.add(
        "bf16 communication",
        "Looked-up vectors and their gradients travel in 16 bits.",
        *(types[0], "bf16", types[1], "bf16"),
    )
    rows.add(
        "bf16", "Dense parts in bfloat16, on one rank.", "--precision", "bf16", base="prefetch"
    )
    rows.add("compile", "Dense parts compiled, on one rank.", "--compile", "true", base="prefetch")
    return rows.rows


def rows_of_b(variant: Variant) -> list[Row]:
    """Return rows with raw text through an encoder: which parts of the encoder are skipped."""
    cache = "--content.modalities.title.cache_frozen_layers"
    dedup = ("--content.dedup", "global")
    first = variant.changed("no cache", cache, "false")
    rows = _Rows(first, "All layers of the encoder run in each step, the top one with LoRA.")
    rows.add("prefix cache", "Outputs of the frozen layers come from disk.", cache, "true")
    rows.add(
        "sampling 20 %",
        "A fifth of a step's items is encoded with gradient, the rest read from the bank.",
        *("--content.sampling.forward", "0.2", "--content.sampling.backward", "0.2"),
    )
    rows.add("2 ranks", "Two processes, each encodes its own items.", base="prefix cache", ranks=2)
    rows.add("global dedup", "Each item of both batches is encoded by one rank.", *dedup)
    rows.add("2 ranks, no cache", "The heavy encoder on two processes.", base="no cache", ranks=2)
    rows.add("global dedup, no cache", "Each item of both is encoded by one rank.", *dedup)
    return rows.rows
