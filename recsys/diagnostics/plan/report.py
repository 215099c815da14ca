"""Formats a description as text tables."""

from __future__ import annotations

from collections.abc import Sequence

from embeddings.plan_text import align_columns
from embeddings.sharding import RESERVED_SHARE
from recsys.diagnostics.plan.description import Description

MOST_RANKS_SHOWN = 16


def format_description(found: Description) -> str:
    """Return all tables, the verdict last."""
    blocks = [
        _cluster(found),
        _parts(found),
        _memory(found),
        f"plan\n{_shortened(found.plan)}",
        _work(found),
        _sent(found),
        _bounds(found),
        _verdict(found),
    ]
    return "\n\n".join(block for block in blocks if block)


def in_bytes(number: float) -> str:
    """Return bytes to three digits: 1,536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def _rounded(number: float) -> str:
    """Return a number to three digits: 1,500 as 1.5 K."""
    for unit in ("", "K", "M", "G", "T"):
        if number < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g} {unit}".strip()


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _cluster(found: Description) -> str:
    cluster, device = found.cluster, found.cluster.device
    ranks = f"{cluster.world_size:,} rank{'s' if cluster.world_size > 1 else ''}"
    return (
        f"{ranks} ({cluster.nodes:,} x {cluster.ranks_per_node:,}) on {device.name}: "
        f"{in_bytes(device.memory_bytes)} and {_rounded(device.memory_bandwidth)}B/s of memory, "
        f"{_rounded(device.fp32_flops)}FLOP/s fp32, {_rounded(device.bf16_flops)}FLOP/s bf16, "
        f"{_rounded(device.node_bandwidth)}B/s in a node, {_rounded(device.network_bandwidth)}B/s "
        f"between nodes\nmeasured from {found.sampled}"
    )


def _parts(found: Description) -> str:
    sized = "weights per rank", "gradients", "optimizer state"
    header = ("part", "parameters", "trained by", "where", *sized)
    rows = []
    for part in found.parts:
        sizes = map(in_bytes, (part.weight_bytes, part.gradient_bytes, part.state_bytes))
        rows.append((part.name, f"{part.parameters:,}", part.trained_by, part.where, *sizes))
    total = f"{sum(part.parameters for part in found.parts):,}"
    text = align_columns([header, *rows, ("total", total, "", "", "", "", "")])
    for name, count in found.frozen_layers.items():
        text += (
            f"\nencoder {name}: {count:,} more run once per item, before training; "
            f"{in_bytes(found.cached_bytes[name])} of their outputs are kept on disk"
        )
    return text


def _memory(found: Description) -> str:
    memory = found.memory
    least, most = min(found.table_bytes), max(found.table_bytes)
    rows = [
        ("memory per rank", "bytes"),
        ("tables and their optimizers", in_bytes(memory.tables)),
        ("dense parts and their optimizer", in_bytes(memory.dense)),
        ("memory bank", in_bytes(memory.bank)),
        ("activations, at least", in_bytes(memory.activations)),
        ("total", f"{in_bytes(memory.total)} of {in_bytes(memory.limit)}"),
    ]
    if memory.host_tables:
        host = f"{in_bytes(memory.host_tables)} of {in_bytes(memory.host_limit)}"
        rows.append(("tables in host memory", host))
    text = align_columns(rows)
    if len(found.table_bytes) > 1:
        text += f"\ntables: {in_bytes(least)} on the emptiest rank, {in_bytes(most)} on the fullest"
    return text


def _shortened(plan: str) -> str:
    """Shorten lines that list the shards of many ranks."""
    lines = []
    for line in plan.splitlines():
        pieces = line.split(", ")
        if len(pieces) > MOST_RANKS_SHOWN:
            line = ", ".join(pieces[:4]) + f", ... {len(pieces):,} shards"
        lines.append(line[:200].rstrip())
    return "\n".join(lines)


def _work(found: Description) -> str:
    rows = found.counts.rows
    header = ("FLOPs per sample", "forward", "backward", "bytes forward", "bytes backward")
    lines: list[Sequence[str]] = [header]
    for part in found.costs:
        both = part.forward, part.backward
        flops = [_rounded(work.flops / rows) for work in both]
        lines.append([part.name, *flops, *(in_bytes(work.bytes / rows) for work in both)])
    forward = sum(part.forward.flops for part in found.costs)
    backward = sum(part.backward.flops for part in found.costs)
    lines.append(("total", _rounded(forward / rows), _rounded(backward / rows), "", ""))
    text = align_columns(lines)
    counts = found.counts
    text += (
        f"\na step of a rank: {counts.rows:,.0f} rows, {counts.history / rows:,.1f} history items "
        f"per row, {counts.unique_history:,.0f} of them unique, {counts.encoded:,.0f} items encoded"
    )
    for name in found.unknown:
        text += f"\nnot counted: {name}"
    return text


def _sent(found: Description) -> str:
    if not found.sent:
        return ""
    header = ("sent per rank and step", "forward", "backward")
    rows = [(kind.name, in_bytes(kind.forward), in_bytes(kind.backward)) for kind in found.sent]
    total = in_bytes(sum(kind.bytes for kind in found.sent))
    return f"{align_columns([header, *rows])}\ntotal {total}"


def _bounds(found: Description) -> str:
    header = ("at least, ms per step", "arithmetic", "memory", "network", "bound by", "share")
    whole = max(found.step_seconds, 1e-12)
    rows = []
    for bound in found.bounds:
        seconds = bound.arithmetic_seconds, bound.memory_seconds, bound.network_seconds
        share = f"{bound.seconds / whole:.0%}"
        rows.append((bound.name, *map(_milliseconds, seconds), bound.bound_by, share))
    longest = max(found.bounds, key=lambda bound: bound.seconds)
    rate = found.counts.rows * found.cluster.world_size / whole
    return (
        f"{align_columns([header, *rows])}\n"
        f"a step takes at least {_milliseconds(found.step_seconds)} ms if nothing overlaps: at "
        f"most {rate:,.0f} samples/s; most of it is {longest.name} ({longest.bound_by})"
    )


def _verdict(found: Description) -> str:
    if found.problems:
        return "\n".join(["does not fit", *(f"  {line}" for line in found.problems)])
    memory = found.memory
    left = memory.limit - memory.total
    others = memory.dense + memory.bank + memory.activations
    if left >= 0 and others <= memory.limit * RESERVED_SHARE:
        return f"fits: {in_bytes(left)} per rank are left"
    if left >= 0:
        reserve = in_bytes(memory.limit * RESERVED_SHARE)
        return (
            f"fits, {in_bytes(left)} per rank are left; but dense parts, bank and activations take "
            f"{in_bytes(others)}, and the planner counts on {reserve} for them"
        )
    # The largest part is reported.
    size, name, fix = max(
        (memory.tables, "tables", "more ranks, a smaller embedding.dim or fewer rows"),
        (memory.dense, "dense parts", "smaller encoders, or fewer layers that train"),
        (
            memory.bank,
            "the memory bank",
            "more ranks, a smaller content.dim, content.history.similarity_features false "
            "(no vectors of single modalities), or fewer rows for the item table",
        ),
        (memory.activations, "activations", "a smaller batch_size"),
    )
    return (
        f"does not fit\n  {in_bytes(memory.total)} per rank of {in_bytes(memory.limit)}; most is "
        f"{name}, {in_bytes(size)}: {fix}"
    )
