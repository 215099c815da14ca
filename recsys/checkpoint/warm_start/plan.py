"""Decides about every tensor of a new run: taken from the other run, or begun anew, or refused.

`plan_warm_start` changes nothing; `WarmStartPlan.apply` fills the job.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.reader import readable_failure
from recsys.checkpoint.state import TrainingState
from recsys.checkpoint.table_export import table_of_key
from recsys.checkpoint.warm_start.differences import Differences
from recsys.checkpoint.warm_start.load import move_rows, move_sets, size_of
from recsys.checkpoint.warm_start.optimizers import choose_optimizer_state
from recsys.checkpoint.warm_start.row_maps import RowMap, row_map
from recsys.checkpoint.warm_start.settings import compare_encoders, compare_settings
from recsys.checkpoint.warm_start.source import Source, Stored
from recsys.model.tables import cold_row_rules

logger = logging.getLogger(__name__)

MODEL = "model."
SCALING = f"{MODEL}scaling."  # a number per dense column and list
OPINIONS = ".opinion_votes.opinions"  # a row per item, as its table
MOST_SHAPES = 8  # in a message
# Parts whose weights make the vectors in the memory bank.
ENCODING = ("model.content.encoders.", "model.content.projections.", "model.content.fusion.")


@dataclass
class WarmStartPlan:
    """Tensors and rows that a new run takes over from another one."""

    source: Source
    differences: Differences
    taken: dict[str, Stored] = field(default_factory=dict)  # the checkpoint of each tensor by name
    # Rows of tables, by table, and of opinions on items, by name of the tensor.
    maps: dict[str, RowMap] = field(default_factory=dict)
    items: RowMap | None = None  # rows of the items; None if the memory bank is filled anew

    def takes(self, parameter: str) -> bool:
        """Return whether a weight or buffer of the model is taken over."""
        return f"{MODEL}{parameter}" in self.taken

    def takes_part(self, prefix: str) -> bool:
        """Return whether any weight or buffer of a part of the model is taken over."""
        return any(name.startswith(f"{MODEL}{prefix}") for name in self.taken)

    @property
    def tables_with_state(self) -> set[str]:
        """Return the tables of which optimizer state is taken over."""
        names = (name for name in self.taken if name.startswith("optimizer.tables."))
        return {table for name in names if (table := _table_of(name)) is not None}

    def take_unused_rows(self, job: Job) -> None:
        """Take over the rows of ids that are new in exact maps, too.

        They were never trained, and predictions by the other run give them to new ids.
        """
        for table in job.schema.tables_with("exact"):
            old, new = (of.vocabularies.get(table) for of in (self.source.schema, job.schema))
            rows = self.maps.get(table)
            if rows is None or not isinstance(old, ExactVocabulary):
                continue
            assert isinstance(new, ExactVocabulary)
            if old.num_embeddings == new.num_embeddings and new.is_extension_of(old):
                same = RowMap.same(rows.num_rows)
                self.maps = {name: same if of is rows else of for name, of in self.maps.items()}
                self.items = same if self.items is rows else self.items

    @torch.no_grad()
    def apply(self, job: Job) -> None:
        """Fill the job with what is taken over; the rest stays. A collective."""
        training = TrainingState(job)
        state = training.state_dict({name: of.entries[name] for name, of in self.taken.items()})
        moved = {name: self._map_of(name) for name in self.taken}
        ranks = job.ranks
        for stored in dict.fromkeys(self.taken.values()):
            whole = {
                name: state[name]
                for name, of in self.taken.items()
                if of is stored and moved[name] is None
            }
            if not whole:
                continue
            with ranks.raise_on_all_ranks(), readable_failure():
                dcp.load(whole, storage_reader=stored.reader, process_group=ranks.group)
        with ranks.raise_on_all_ranks():
            for name, rows in moved.items():
                if rows is not None:
                    move = move_sets if name.startswith("vocabulary.") else move_rows
                    move(state[name], self.taken[name].tensor(name), rows)
        training.finish_loading()

    def _map_of(self, name: str) -> RowMap | None:
        """Return the rows of a tensor whose rows move; None if they are the same."""
        rows = self.items if name == "bank" else self.maps.get(_table_of(name) or name)
        return None if rows is None or rows.is_identity else rows


def _table_of(name: str) -> str | None:
    """Return the table that a tensor belongs to."""
    if name.startswith("vocabulary."):
        return name.split(".")[1]
    for prefix in ("optimizer.tables.", "optimizer.average."):
        name = name.replace(prefix, MODEL, 1)
    return table_of_key(name)


def plan_warm_start(job: Job, source: Source, differences: Differences) -> WarmStartPlan:
    """Compare the job with another run, and decide what it takes over. A collective.

    Args:
        job: the new run, not yet trained.
        source: the other run.
        differences: those of the columns; gets the others.

    Raises:
        ValueError: on every rank: something cannot be reconciled; lists it all, with the fix.
    """
    plan = WarmStartPlan(source, differences)
    own = TrainingState(job).state_dict()
    with job.ranks.raise_on_all_ranks():
        compare_settings(source, job, differences)
        _check_patterns(plan, own)
    shapes: dict[str, str] = {}
    for name in _shared_weights(plan, own):
        table = table_of_key(name)
        rows = row_map(table, source, job, differences) if table is not None else None
        stored, tensor = source.model.entries[name], own[name]
        if table is not None and rows is not None:
            plan.maps[table] = rows
        if name.startswith(SCALING) and tuple(stored.size) != size_of(tensor):
            differences.add("scales of numbers", "other columns have numbers", "fitted anew")
            continue
        if name.endswith(OPINIONS):
            if (of_items := plan.maps.get(job.schema.target_item)) is None:
                words = "the rows of items are not taken over"
                differences.add(name.removeprefix(MODEL), words, "counted anew")
                continue
            plan.maps[name] = of_items
        # The rows of a table may differ, and so may those of opinions.
        first = 1 if table is not None or name in plan.maps else 0
        if tuple(stored.size)[first:] != size_of(tensor)[first:]:
            shapes[name.removeprefix(MODEL)] = f"{list(stored.size)} -> {list(size_of(tensor))}"
        plan.taken[name] = source.model
    _refuse_shapes(shapes, differences)
    with job.ranks.raise_on_all_ranks():
        _choose_vocabularies(plan, own)
        is_same = compare_encoders(source, job, plan.takes, differences)
    _choose_bank(plan, job, own, is_same)
    with job.ranks.raise_on_all_ranks():
        choose_optimizer_state(plan.source, job, own, plan.taken, differences)
        _refuse_rules_without_state(plan, job)
        differences.check(source.model.folder)
    return plan


def _refuse_rules_without_state(plan: WarmStartPlan, job: Job) -> None:
    """Refuse rules for new rows of a table that is taken over without its optimizer state."""
    with_state = plan.tables_with_state
    taken = {table_of_key(name) for name in plan.taken if name.startswith(MODEL)}
    for table, rule in cold_row_rules(job.config, job.schema).items():
        if table in taken and table not in with_state:
            plan.differences.refuse(
                f"embedding.tables.{table}.new_rows",
                f"{rule} applies to rows whose moments are zero, and the table's optimizer state "
                "begins anew",
                "take that state over, or set random",
            )


def _refuse_shapes(shapes: dict[str, str], differences: Differences) -> None:
    """Refuse weights whose shapes do not fit, with the patterns that leave them out."""
    if shapes:
        listed = [f"{name} {words}" for name, words in shapes.items()][:MOST_SHAPES]
        more = len(shapes) - len(listed)
        patterns = dict.fromkeys(
            f"'*.{table}.*'"
            if (table := table_of_key(MODEL + name))
            else f"'{'.'.join(name.split('.')[:2])}*'"
            for name in shapes
        )
        differences.refuse(
            "shapes that do not fit",
            ", ".join(listed) + (f" and {more:,} more" if more else ""),
            f"set back what they depend on, or --warm-start.skip {' '.join(patterns)}",
        )


def _check_patterns(plan: WarmStartPlan, own: Iterable[str]) -> None:
    """Refuse patterns that match no parameter, which are mistakes."""
    names = {*own, *plan.source.model.entries}
    parameters = [name.removeprefix(MODEL) for name in names if name.startswith(MODEL)]
    for pattern in plan.source.request.unmatched(parameters):
        example = min(parameters)
        plan.differences.refuse(
            f"'{pattern}'",
            "no parameter of either run has such a name",
            f"correct the pattern of --warm-start.only or skip; one of the names is {example}",
        )


def _shared_weights(plan: WarmStartPlan, own: Iterable[str]) -> list[str]:
    """Return the weights that both runs have and that are asked for; list the others."""
    source, names = plan.source, {name for name in own if name.startswith(MODEL)}
    stored = {name for name in source.model.entries if name.startswith(MODEL)}
    skipped = {name for name in names & stored if not source.request.takes(name[len(MODEL) :])}
    for part, what, rule in (
        (names - stored, "not in the run", "added, with initial values"),
        (stored - names, "not in this model", "dropped"),
        (skipped, "not asked for", "initial values"),
    ):
        for group, count in _grouped(part).items():
            plan.differences.add(group, f"{what} ({count:,} tensor{'s' * (count > 1)})", rule)
    taken = sorted((names & stored) - skipped)
    if not taken:
        plan.differences.refuse(
            "the model", "no parameter is taken over", "name others in --warm-start.only or skip"
        )
    return taken


def _grouped(names: set[str]) -> dict[str, int]:
    """Count names by their first parts."""
    parts = [name.removeprefix(MODEL).split(".") for name in sorted(names)]
    return Counter(".".join(each[:3]) + (".*" if len(each) > 3 else "") for each in parts)


def _choose_vocabularies(plan: WarmStartPlan, own: Iterable[str]) -> None:
    """Take the bounded vocabularies of the tables that are taken over."""
    tables = {table_of_key(name) for name in plan.taken}
    names = [name for name in own if name.startswith("vocabulary.")]
    for table in dict.fromkeys(name.split(".")[1] for name in names):
        part, rows = f"vocabulary of '{table}'", plan.maps.get(table)
        if table not in tables:
            plan.differences.add(part, "its table is not taken over", "begins empty")
            continue
        for name in [name for name in names if name.split(".")[1] == table]:
            entry = name.split(".")[-1]
            if name not in plan.source.model.entries:  # only ids that wait may be missing
                continue
            if entry.startswith("waiting") and rows is not None and not rows.is_identity:
                plan.differences.add(part, f"{entry} of other sets", "anew")
            else:
                plan.taken[name] = plan.source.model


def _choose_bank(plan: WarmStartPlan, job: Job, own: dict[str, Any], is_same: bool) -> None:
    """Take the vectors of the memory bank if the encoders that made them are. A collective."""
    stored = plan.source.model.entries
    if "bank" not in own:
        return
    item, differences = job.schema.target_item, plan.differences
    encoding = {name for name in {*own, *stored} if name.startswith(ENCODING)}
    if "bank" not in stored:
        why = "not in the run"
    elif stored["bank"].size[1] != size_of(own["bank"])[1]:
        why = f"vectors of {stored['bank'].size[1] - 1} numbers before"
    elif not is_same or not all(name in plan.taken for name in encoding):
        why = "its vectors are of other encoders"
    else:
        rows = plan.maps.get(item)
        if rows is None:  # the table is not taken over, but its raw ids are the same
            rows = row_map(item, plan.source, job, Differences())
        if rows is not None:
            plan.items, plan.taken["bank"] = rows, plan.source.model
            return
        why = "the items have other rows"
    differences.add("memory bank", why, "all items are encoded")
