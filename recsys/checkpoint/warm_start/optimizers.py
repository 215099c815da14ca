"""Decides which state of the optimizers a new run takes over: that of parameters it takes over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from recsys.build import Job
from recsys.checkpoint.table_export import table_of_key
from recsys.checkpoint.warm_start.differences import Differences
from recsys.checkpoint.warm_start.source import Source, Stored
from recsys.config import Config
from recsys.data.schema import Schema
from recsys.model.tables import table_configs

FIX = "set it back, or --warm-start.optimizer false"
DENSE, TABLES, AVERAGE = "optimizer.dense.", "optimizer.tables.", "optimizer.average."


def choose_optimizer_state(
    source: Source,
    job: Job,
    own: Iterable[str],
    taken: dict[str, Stored],
    differences: Differences,
) -> None:
    """Add the state of optimizers to what is taken over.

    Args:
        source: the other run.
        job: the new run.
        own: names in the new run's state, before its first step.
        taken: what is taken over, with its checkpoint; gets the state.
        differences: gets what differs.
    """
    stored = source.optimizer
    if stored is None:
        why = "the run keeps no checkpoint of a step" if source.request.optimizer else "as asked"
        differences.add("optimizer state", why, "begins anew")
        return
    step, of_model = stored.manifest["step"], source.model.manifest["step"]
    if step != of_model:
        what = f"the run keeps that of step {step:,}, not of the model's step {of_model:,}"
        differences.add("optimizer state", what, f"of step {step:,}")
    weights = [name.removeprefix("model.") for name in taken if name.startswith("model.")]
    names = list(_of_tables(source, stored, job, weights, differences))
    names += _of_dense(source, stored, job, weights, differences)
    if job.averages is not None:
        averages = [name for name in own if name.startswith(AVERAGE)]
        names += _averages(source, stored, averages, weights, differences)
    taken |= dict.fromkeys(names, stored)


def _of_tables(
    source: Source, stored: Stored, job: Job, weights: list[str], differences: Differences
) -> Iterator[str]:
    """Yield the state of fused optimizers to take."""
    before = _table_optimizers(source.config, source.schema)
    now = _table_optimizers(job.config, job.schema)
    bounded = job.schema.tables_with("bounded")
    is_of_other_step = stored.manifest["step"] != source.model.manifest["step"]
    for weight in weights:
        table = table_of_key(f"model.{weight}")
        if table is None:
            continue
        part, what = f"optimizer state of '{table}'", f"{before[table]} before, {now[table]} now"
        if "none" in (before[table], now[table]) and before[table] != now[table]:
            differences.add(part, what, "begins anew")
        elif before[table] != now[table]:
            differences.refuse(part, what, FIX)
        elif table in bounded and is_of_other_step:
            differences.add(part, "its rows have had other ids since", "begins anew")
        else:
            yield from (of for of in stored.entries if of.startswith(f"{TABLES}{weight}."))


def _table_optimizers(config: Config, schema: Schema) -> dict[str, str]:
    """Return the optimizer of each table; none of a frozen one."""
    return {
        table.name: "none" if table.frozen else table.optimizer
        for table in table_configs(config, schema)
    }


def _of_dense(
    source: Source, stored: Stored, job: Job, weights: list[str], differences: Differences
) -> Iterator[str]:
    """Yield the state of the dense optimizer to take."""
    settings = source.config.optimizer, job.config.optimizer
    kinds = [(of.name, of.options) for of in settings]
    if kinds[0] != kinds[1]:
        what = f"{kinds[0][0]} {kinds[0][1]} before, {kinds[1][0]} {kinds[1][1]} now"
        differences.refuse("state of the dense optimizer", what, FIX)
        return
    trained = {name for name, value in job.em3.named_parameters() if value.requires_grad}
    for name in stored.entries:
        parameter = name.removeprefix(DENSE).rsplit(".", 1)[0]
        if name.startswith(DENSE) and parameter in trained and parameter in weights:
            yield name


def _averages(
    source: Source, stored: Stored, names: list[str], weights: list[str], differences: Differences
) -> list[str]:
    """Return the moving averages to take, all or none: they have one count of updates."""
    parameters = [name.removeprefix(AVERAGE) for name in names if not name.endswith("num_updates")]
    if stored is not source.model:
        why = "the best model has averages for its weights"
    elif not all(name in stored.entries for name in names):
        why = "not in the run"
    elif not set(parameters) <= set(weights):
        why = "not all of its weights are taken over"
    else:
        return names
    differences.add("averaged weights", why, "begin at the weights")
    return []
