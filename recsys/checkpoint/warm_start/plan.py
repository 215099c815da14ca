"""Decides for every tensor of a new run: taken over, initialised, or refused."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed.checkpoint as dcp

from embeddings.table_state import State
from recsys.build import Job
from recsys.checkpoint.compatibility import modalities_of
from recsys.checkpoint.reader import readable_failure, table_of_key
from recsys.checkpoint.run_schema import exact_maps
from recsys.checkpoint.state import TrainingState
from recsys.checkpoint.warm_start.rows import RowMap, move_rows, move_sets, row_map, size_of
from recsys.checkpoint.warm_start.source import (
    Differences,
    Source,
    StoredState,
    compare_encoders,
    compare_settings,
)
from recsys.config import Config
from recsys.data.schema import Schema
from recsys.model.tables import cold_row_rules, pooled_features, table_configs

logger = logging.getLogger(__name__)

MODEL = "model."
BANKS = ("bank", "encoder_outputs")  # tensors with a row per item, of the memory bank's rows
DENSE, TABLES, AVERAGE = "optimizer.dense.", "optimizer.tables.", "optimizer.average."
SCALING = f"{MODEL}scaling."  # a number per dense column and list
MAX_SHAPES = 8  # in a message
# Parts whose weights make the vectors in the memory bank.
ENCODING = ("model.content.encoders.", "model.content.projections.", "model.content.fusion.")
# Parts whose weights depend on the order of a kind of inputs; default: the ranking model.
_PREFIXES_BY_KIND = {
    "modalities": ("ranking.", "content."),
    "further sequences": ("ranking.", "further_histories."),
}
OPTIMIZER_FIX = "set it back, or --warm-start-optimizer false"


@dataclass
class WarmStartPlan:
    """Tensors and rows that a new run takes over from another one."""

    source: Source
    tensors: dict[str, StoredState] = field(default_factory=dict)  # checkpoint of each, by name
    # Rows of tables, by table, and rows of tensors with a row per item, by tensor.
    maps: dict[str, RowMap] = field(default_factory=dict)
    items: RowMap | None = None  # rows of the items; None if the memory bank is filled anew

    @property
    def differences(self) -> Differences:
        return self.source.differences

    def __str__(self) -> str:
        model = self.source.model
        summary = f"{model.folder}, step {model.step:,}: {len(self.tensors):,} tensors"
        return f"warm start from {summary}\n{self.differences}\n"

    @property
    def weights(self) -> list[str]:
        return [name.removeprefix(MODEL) for name in self.tensors if name.startswith(MODEL)]

    def takes(self, parameter: str) -> bool:
        return f"{MODEL}{parameter}" in self.tensors

    @property
    def tables_with_state(self) -> set[str]:
        names = (name for name in self.tensors if name.startswith(TABLES))
        return {table for name in names if (table := _table_of(name)) is not None}

    def take_unused_rows(self, job: Job) -> None:
        """Take over unused rows of exact maps, too, which new ids get."""
        new_maps = exact_maps(job.schema)
        for table, old in exact_maps(self.source.schema).items():
            rows, new = self.maps.get(table), new_maps.get(table)
            if rows is None or new is None or old.num_embeddings != new.num_embeddings:
                continue
            if new.is_extension_of(old):
                identity = RowMap.identity(rows.num_rows)
                self.maps = {
                    name: identity if other is rows else other for name, other in self.maps.items()
                }
                self.items = identity if self.items is rows else self.items

    @torch.no_grad()
    def apply(self, job: Job) -> None:
        """Load the tensors and rows that are taken over into the job. A collective."""
        training, ranks = TrainingState(job), job.ranks
        entries = {name: stored.entries[name] for name, stored in self.tensors.items()}
        state = training.state_dict(entries)
        moved: dict[str, RowMap] = {}
        for name in self.tensors:
            rows = self.items if name in BANKS else self.maps.get(_table_of(name) or name)
            if rows is not None and not rows.is_identity:
                moved[name] = rows
        for stored in dict.fromkeys(self.tensors.values()):
            unmoved = {
                name: state[name]
                for name, checkpoint in self.tensors.items()
                if checkpoint is stored and name not in moved
            }
            if unmoved:
                with ranks.raise_on_all_ranks(), readable_failure():
                    dcp.load(unmoved, storage_reader=stored.reader, process_group=ranks.group)
        with ranks.raise_on_all_ranks():
            for name, rows in moved.items():
                move = move_sets if name.startswith("vocabulary.") else move_rows
                move(state[name], self.tensors[name].tensor(name), rows)
        training.finish_loading()


def _table_of(name: str) -> str | None:
    if name.startswith("vocabulary."):
        return name.split(".")[1]
    for prefix in (TABLES, AVERAGE):
        name = name.replace(prefix, MODEL, 1)
    return table_of_key(name)


def plan_warm_start(job: Job, source: Source) -> WarmStartPlan:
    """Compare the job with another run; decide what it takes, or list faults. A collective."""
    plan, state = WarmStartPlan(source), TrainingState(job).state_dict()
    with job.ranks.raise_on_all_ranks():
        compare_settings(source, job.config)
        _refuse_moved_inputs(source, job)
        names = {*state, *source.model.entries}
        parameters = [name.removeprefix(MODEL) for name in names if name.startswith(MODEL)]
        for pattern in source.request.unmatched(parameters):
            problem, example = "no parameter of either run has such a name", min(parameters)
            fix = f"correct the pattern of --warm-start-only or skip; one of the names is {example}"
            plan.differences.refuse(f"'{pattern}'", problem, fix)
    _choose_weights(plan, job, state)
    with job.ranks.raise_on_all_ranks():
        _choose_vocabularies(plan, state)
        is_same = compare_encoders(source, job, plan.takes)
    _choose_bank(plan, job, state, is_same)
    with job.ranks.raise_on_all_ranks():
        _choose_optimizer_state(plan, job, state)
        _refuse_rules_without_state(plan, job)
        plan.differences.check(source.model.folder)
    return plan


def _refuse_moved_inputs(source: Source, job: Job) -> None:
    """Refuse weights whose inputs or labels have another order in the new model.

    Another number of inputs changes the shapes, except for labels and further sequences.
    """
    inputs = _inputs(source.config, source.schema)
    for kind, names in _inputs(job.config, job.schema).items():
        previous, prefixes = inputs.get(kind, names), _PREFIXES_BY_KIND.get(kind, ("ranking.",))
        shared = [name for name in names if name in previous]
        are_moved = len(names) == len(previous) and names != previous
        if kind in ("labels", "further sequences"):
            are_moved &= bool(shared)
            are_moved |= any(names.index(name) != previous.index(name) for name in shared)
        if are_moved and any(map(source.request.takes, prefixes)):
            change = f"their places tell them apart, and were {previous}, are {names}"
            patterns = " ".join(f"'{prefix}*'" for prefix in prefixes)
            fix = f"keep the places of the run, or --warm-start-skip {patterns}"
            source.differences.refuse(kind, change, fix)


def _inputs(config: Config, schema: Schema) -> dict[str, list[str]]:
    """Return the inputs and labels that a model distinguishes by order alone, by kind."""
    lists = {f"lists beside '{history.name}'": history.numbers for history in schema.histories}
    dense, pooled = schema.of_kind("dense"), pooled_features(config.embedding, schema)
    query, features = list[str](), getattr(config.ranking, "query_features", None)
    if features is not None:  # of a retrieval model
        query = [name for name in (*pooled, *dense) if name in {schema.group, *features}]
    return lists | {
        "dense columns": dense,
        "id columns": pooled,
        "columns of the user": query,
        "further sequences": [history.name for history in schema.histories[1:]],
        "labels": schema.of_kind("label"),
        "modalities": modalities_of(config),
    }


def _numbers(schema: Schema) -> list[list[str]]:
    return [schema.of_kind("dense"), *(history.numbers for history in schema.histories)]


def _choose_weights(plan: WarmStartPlan, job: Job, state: State) -> None:
    """Take the weights and buffers that both runs have, with the rows of tables. A collective."""
    source, differences, shapes = plan.source, plan.differences, dict[str, str]()
    scales_differ = _numbers(source.schema) != _numbers(job.schema)
    item_tensors = {
        f"{MODEL}{path}.{buffer}"
        for path, module in job.em3.named_modules()
        for buffer in getattr(module, "item_row_buffers", ())
    }
    for name in _shared_weights(plan, state):
        table = table_of_key(name)
        if table is not None:
            rows = row_map(table, source, job.schema, job.ranks)
            plan.maps |= {} if rows is None else {table: rows}
        stored, size = tuple(source.model.entries[name].size), size_of(state[name])
        if name.startswith(SCALING) and (stored != size or scales_differ):
            differences.add("scales of numbers", "other columns have numbers", "fitted anew")
            continue
        if name in item_tensors:
            if (item_rows := plan.maps.get(job.schema.target_item)) is None:
                reason = "the rows of items are not taken over"
                differences.add(name.removeprefix(MODEL), reason, "counted anew")
                continue
            plan.maps[name] = item_rows
        has_rows = table is not None or name in plan.maps  # whose number may differ
        if stored[has_rows:] != size[has_rows:]:
            shapes[name.removeprefix(MODEL)] = f"{list(stored)} -> {list(size)}"
        plan.tensors[name] = source.model
    _refuse_shapes(shapes, differences)


def _refuse_rules_without_state(plan: WarmStartPlan, job: Job) -> None:
    tables = {table_of_key(name) for name in plan.tensors if name.startswith(MODEL)}
    problem = "applies to rows whose moments are zero, and the table's optimizer state begins anew"
    fix = "take that state over, or set random"
    for table, rule in cold_row_rules(job.config, job.schema).items():
        if table in tables - plan.tables_with_state:
            setting = f"embedding.tables.{table}.new_rows"
            plan.differences.refuse(setting, f"{rule} {problem}", fix)


def _refuse_shapes(shapes: dict[str, str], differences: Differences) -> None:
    if shapes:
        shown = [f"{name} {sizes}" for name, sizes in shapes.items()][:MAX_SHAPES]
        num_unlisted = len(shapes) - len(shown)
        patterns = dict.fromkeys(
            f"'*.{table}.*'"
            if (table := table_of_key(MODEL + name))
            else f"'{'.'.join(name.split('.')[:2])}*'"
            for name in shapes
        )
        changes = ", ".join(shown) + (f" and {num_unlisted:,} more" if num_unlisted else "")
        fix = f"set back what they depend on, or --warm-start-skip {' '.join(patterns)}"
        differences.refuse("shapes that do not fit", changes, fix)


def _shared_weights(plan: WarmStartPlan, state: State) -> list[str]:
    """Return the requested weights that both runs have; list all others as differences."""
    request, names = plan.source.request, {name for name in state if name.startswith(MODEL)}
    stored = {name for name in plan.source.model.entries if name.startswith(MODEL)}
    skipped = {name for name in names & stored if not request.takes(name.removeprefix(MODEL))}
    for omitted, reason, rule in (
        (names - stored, "not in the run", "added, with initial values"),
        (stored - names, "not in this model", "dropped"),
        (skipped, "not asked for", "initial values"),
    ):
        paths = [name.removeprefix(MODEL).split(".") for name in sorted(omitted)]
        groups = Counter(".".join(path[:3]) + ".*" * (len(path) > 3) for path in paths)
        for group, count in groups.items():
            plan.differences.add(group, f"{reason} ({count:,} tensor{'s' * (count > 1)})", rule)
    shared = sorted((names & stored) - skipped)
    if not shared:
        fix = "name others in --warm-start-only or skip"
        plan.differences.refuse("the model", "no parameter is taken over", fix)
    return shared


def _choose_vocabularies(plan: WarmStartPlan, state: State) -> None:
    tables = {table_of_key(name) for name in plan.tensors}
    names = [name for name in state if name.startswith("vocabulary.")]
    for table in dict.fromkeys(name.split(".")[1] for name in names):
        subject, rows = f"vocabulary of '{table}'", plan.maps.get(table)
        if table not in tables:
            plan.differences.add(subject, "its table is not taken over", "begins empty")
            continue
        for name in names:
            if name.split(".")[1] != table or name not in plan.source.model.entries:
                continue  # only ids that wait may be missing
            entry = name.split(".")[-1]
            if entry.startswith("waiting") and rows is not None and not rows.is_identity:
                plan.differences.add(subject, f"{entry} of other sets", "anew")
            else:
                plan.tensors[name] = plan.source.model


def _choose_bank(plan: WarmStartPlan, job: Job, state: State, is_same: bool) -> None:
    """Take the memory bank, and outputs beside it, if the encoders are taken. A collective."""
    stored, banks = plan.source.model.entries, [name for name in BANKS if name in state]
    if not banks:
        return
    encoding = {name for name in {*state, *stored} if name.startswith(ENCODING)}
    if "bank" not in stored:
        reason = "not in the run"
    elif stored["bank"].size[1] != size_of(state["bank"])[1]:
        reason = f"vectors of {stored['bank'].size[1] - 1} numbers before"
    elif not is_same or not encoding <= plan.tensors.keys():
        reason = "its vectors are of other encoders"
    elif any(name not in stored for name in banks):
        reason = "the run has no outputs of trained encoders beside it"
    else:
        item = job.schema.target_item
        rows = plan.maps.get(item)
        if rows is None:  # the table is not taken over, but its raw ids are the same
            unlisted = replace(plan.source, differences=Differences())
            rows = row_map(item, unlisted, job.schema, job.ranks)
        if rows is not None:
            plan.items = rows
            plan.tensors |= dict.fromkeys(banks, plan.source.model)
            return
        reason = "the items have other rows"
    plan.differences.add("memory bank", reason, "all items are encoded")


def _choose_optimizer_state(plan: WarmStartPlan, job: Job, state: State) -> None:
    stored, differences = plan.source.optimizer, plan.differences
    if stored is None:
        is_requested = plan.source.request.optimizer
        reason = "the run keeps no checkpoint of a step" if is_requested else "as asked"
        differences.add("optimizer state", reason, "begins anew")
        return
    if stored.step != (model_step := plan.source.model.step):
        note = f"the run keeps that of step {stored.step:,}, not of the model's step {model_step:,}"
        differences.add("optimizer state", note, f"of step {stored.step:,}")
    names = [*_table_states(plan, stored, job), *_dense_states(plan, stored, job)]
    if job.averages is not None:
        names += _averages(plan, stored, state)
    plan.tensors |= dict.fromkeys(names, stored)


def _table_states(plan: WarmStartPlan, stored: StoredState, job: Job) -> Iterator[str]:
    previous = _table_optimizers(plan.source.config, plan.source.schema)
    current = _table_optimizers(job.config, job.schema)
    bounded = job.schema.tables_with("bounded")
    for weight in plan.weights:
        table = table_of_key(f"{MODEL}{weight}")
        if table is None:
            continue
        subject, optimizers = f"optimizer state of '{table}'", (previous[table], current[table])
        if optimizers[0] != optimizers[1]:
            change = f"{optimizers[0]} before, {optimizers[1]} now"
            if "none" in optimizers:
                plan.differences.add(subject, change, "begins anew")
            else:
                plan.differences.refuse(subject, change, OPTIMIZER_FIX)
        elif table in bounded and stored.step != plan.source.model.step:
            plan.differences.add(subject, "its rows have had other ids since", "begins anew")
        else:
            yield from (name for name in stored.entries if name.startswith(f"{TABLES}{weight}."))


def _table_optimizers(config: Config, schema: Schema) -> dict[str, str]:
    tables = table_configs(config, schema)
    return {table.name: "none" if table.frozen else table.optimizer for table in tables}


def _dense_states(plan: WarmStartPlan, stored: StoredState, job: Job) -> Iterator[str]:
    previous, current = plan.source.config.optimizer, job.config.optimizer
    if (previous.name, previous.options) != (current.name, current.options):
        change = f"{previous.name} {previous.options} before, {current.name} {current.options} now"
        plan.differences.refuse("state of the dense optimizer", change, OPTIMIZER_FIX)
        return
    trained = {name for name, value in job.em3.named_parameters() if value.requires_grad}
    trained.intersection_update(plan.weights)
    for name in stored.entries:
        if name.startswith(DENSE) and name.removeprefix(DENSE).rsplit(".", 1)[0] in trained:
            yield name


def _averages(plan: WarmStartPlan, stored: StoredState, state: Iterable[str]) -> list[str]:
    """Return the moving averages to take, all or none: they have one count of updates."""
    names = [name for name in state if name.startswith(AVERAGE)]
    parameters = {name.removeprefix(AVERAGE) for name in names if not name.endswith("num_updates")}
    if stored is not plan.source.model:
        reason = "the best model has averages for its weights"
    elif not all(name in stored.entries for name in names):
        reason = "not in the run"
    elif not parameters <= set(plan.weights):
        reason = "not all of its weights are taken over"
    else:
        return names
    plan.differences.add("averaged weights", reason, "begin at the weights")
    return []
