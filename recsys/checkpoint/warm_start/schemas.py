"""Reconciles the columns of new data with those that a run was trained on.

The model reads columns, labels and lists by their place, so the new run has them in the order of
the run it starts from, and further ones behind. Values fitted for transforms are those of that run.
"""

from __future__ import annotations

from recsys.checkpoint.run_schema import FILE, changes, described_columns
from recsys.checkpoint.warm_start.differences import Differences
from recsys.checkpoint.warm_start.source import Source
from recsys.config.parser import short
from recsys.data.schema import Schema, load_schema, load_vocabularies
from recsys.data.schema_columns import IdType
from recsys.data.transforms.chain import set_chain
from recsys.storage.location import Location

# Attributes of which `row_maps` decides, since they concern the rows of a table alone.
_OF_ROWS = ("num_embeddings", "vocabulary.kind", "vocabulary.num_hashes", "vocabulary.seed")
# Attributes that change how the model is trained or measured, but not what its weights mean.
_FREE = ("vocabulary.admit_after", "vocabulary.half_life", "loss", "nullable")


def reconciled_schema(
    source: Source, root: Location, differences: Differences, with_vocabularies: bool = True
) -> Schema:
    """Load a dataset's schema for a model that starts from a run.

    Raises:
        ValueError: the dataset's schema is invalid.
    """
    trained, data = source.schema, load_schema(root, with_vocabularies=False)
    _keep_fits(trained, data, differences)
    _compare(trained, data, differences)
    data.columns = {
        name: data.columns[name]
        for name in [*trained.columns, *data.columns]
        if name in data.columns
    }
    for name, column in data.columns.items():
        known = trained.columns[name].parallel if name in trained.columns else []
        further = [each for each in column.parallel if each not in known]
        column.parallel = [each for each in known if each in column.parallel] + further
    place = str(source.request.run / FILE)
    for table, known_type in trained.id_types.items():
        if data.vocabulary_of(table) is not None:
            data.id_types[table] = IdType(known_type.name, place)
    differences.check(source.model.folder)
    if with_vocabularies:
        load_vocabularies(data, root)
    return data


def _keep_fits(trained: Schema, data: Schema, differences: Differences) -> None:
    """Give transformed columns the values that were fitted for the run."""
    for name, chain in data.transforms.items():
        own = trained.transforms.get(name)
        if own is None or not own.is_fit_of(chain.without_fit) or own == chain:
            continue
        if chain.unfitted is None:
            differences.add(f"column '{name}'", "its transform was fitted anew", "fit of the run")
        data.transforms[name] = own
        set_chain(data.columns[name], own)


def _compare(trained: Schema, data: Schema, differences: Differences) -> None:
    if trained.target_item != data.target_item:
        differences.refuse(
            "target_item",
            f"'{trained.target_item}' in the run, '{data.target_item}' in the data",
            "name the run's column, or train anew",
        )
    for what in changes("group", {"": trained.group}, {"": data.group}):
        differences.add("group", what, "measured by the data's")
    before, now = described_columns(trained), described_columns(data)
    for name in [*before, *(now.keys() - before.keys())]:
        if name not in now:
            differences.add(name, "not in the data", "dropped")
        elif name not in before:
            differences.add(name, "not in the run", "added")
        else:
            _compare_column(name, before[name], now[name], differences)


def _compare_column(
    name: str, before: dict[str, object], now: dict[str, object], differences: Differences
) -> None:
    for attribute in sorted(before.keys() | now.keys()):
        values = before.get(attribute), now.get(attribute)
        if values[0] == values[1] or attribute in _OF_ROWS:
            continue
        what = f"{attribute} was {short(values[0])}, is {short(values[1])}"
        if attribute in _FREE:
            differences.add(name, what, "as in the data")
        else:
            differences.refuse(name, what, "set it back, or give the column another name")
