"""Summarizes the traced steps of all ranks as a table, `profile.json` and scalars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from embeddings.plan_text import align_columns
from recsys.diagnostics.profile.step_trace import PARTS, StepTrace


@dataclass
class RankProfile:
    """Measurements of one rank."""

    plain_seconds: list[float]  # durations of steps without profiler
    steps: list[StepTrace]


def summary(profiles: list[RankProfile], device: str) -> dict[str, Any]:
    """Compute the content of `profile.json`: median and range over ranks of their mean per step.

    For each rank, the parts add up to the step.
    """
    ranks = [profile.steps for profile in profiles]
    assert all(ranks)
    parts = [part for part in PARTS if any(s.seconds[part] for steps in ranks for s in steps)]
    on_device = [part for part in PARTS if any(part in s.device_seconds for s in ranks[0])]
    return {
        "world_size": len(ranks),
        "device": device,
        "steps": len(ranks[0]),
        "seconds": {
            "step": _over_ranks(fmean(sum(s.seconds.values()) for s in steps) for steps in ranks),
            "step_without_profiler": _over_ranks(fmean(p.plain_seconds) for p in profiles),
        },
        "parts": {
            part: _over_ranks(fmean(s.seconds[part] for s in steps) for steps in ranks)
            for part in parts
        },
        "device_parts": {
            part: _over_ranks(
                fmean(s.device_seconds.get(part, 0.0) for s in steps) for steps in ranks
            )
            for part in on_device
        },
        "collectives": _collectives(ranks),
        "ranks": [[step.seconds for step in steps] for steps in ranks],
    }


def _over_ranks(values: Iterable[float]) -> dict[str, float]:
    known = list(values)
    return {"median": median(known), "min": min(known), "max": max(known)}


def _collectives(ranks: list[list[StepTrace]]) -> list[dict[str, Any]]:
    """Return one row for each part of a step and kind of collective in it."""
    found = {(part, c.kind) for steps in ranks for s in steps for part, c in s.collectives}
    rows = []
    for part, kind in sorted(found, key=lambda key: (PARTS.index(key[0]), key[1])):
        of_ranks = []
        for steps in ranks:
            calls = [c for s in steps for p, c in s.collectives if (p, c.kind) == (part, kind)]
            sums = len(calls), sum(c.bytes_sent for c in calls), sum(c.seconds for c in calls)
            of_ranks.append([number / len(steps) for number in sums])
        per_step = dict(zip(("calls", "bytes_sent", "seconds"), map(_over_ranks, zip(*of_ranks))))
        rows.append({"part": part, "kind": kind, **per_step})
    return rows


def format_profile(report: dict[str, Any]) -> str:
    """Format the report as text tables."""
    step = report["seconds"]["step"]
    rows: list[tuple[str, ...]] = [("part of a step", "ms", "min", "max", "share")]
    for name, values in {**report["parts"], "step": step}.items():
        share = f"{values['median'] / step['median']:.0%}"
        rows.append((name, *_milliseconds(values), share))
    plain = report["seconds"]["step_without_profiler"]
    rows.append(("step without profiler", *_milliseconds(plain), ""))
    title = (
        f"profile of {report['steps']} steps, median and range over {report['world_size']} ranks"
    )
    tables = [title, align_columns(rows)]
    if report["device_parts"]:
        rows = [("busy on the device, by part that launched", "ms", "min", "max")]
        rows += [(name, *_milliseconds(v)) for name, v in report["device_parts"].items()]
        tables += ["", align_columns(rows)]
    if report["collectives"]:
        tables += ["", align_columns(_collective_rows(report["collectives"]))]
    return "\n".join(tables)


def _collective_rows(collectives: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("collective", "in", "calls", "bytes sent", "min", "max", "ms")]
    for row in collectives:
        sent = [f"{row['bytes_sent'][name]:,.0f}" for name in ("median", "min", "max")]
        ms = _milliseconds(row["seconds"])[0]
        rows.append((row["kind"], row["part"], f"{row['calls']['median']:g}", *sent, ms))
    return rows


def _milliseconds(values: dict[str, float]) -> tuple[str, str, str]:
    median_, low, high = (f"{1e3 * values[name]:.2f}" for name in ("median", "min", "max"))
    return median_, low, high


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """Return the report's medians by name, for TensorBoard."""
    seconds = {**report["parts"], **report["seconds"]}
    values = {f"profile_seconds/{name}": v["median"] for name, v in seconds.items()}
    for row in report["collectives"]:
        values[f"profile_bytes/{row['kind']} in {row['part']}"] = row["bytes_sent"]["median"]
    return values
