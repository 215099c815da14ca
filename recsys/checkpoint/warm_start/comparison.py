"""Compares columns, settings and frozen encoders of a new run with those of the run it starts from.

The new run has columns in the order of that run, further ones behind, and its fitted transforms.
"""

from __future__ import annotations

from collections.abc import Callable

from recsys.build import Job
from recsys.checkpoint.compatibility import differing_settings
from recsys.checkpoint.run_folder import encoder_identities
from recsys.checkpoint.run_schema import FILE, changes, described_columns
from recsys.checkpoint.state import frozen_digest
from recsys.checkpoint.warm_start.source import Differences, Source
from recsys.config import Config, content_settings
from recsys.config.parser import short
from recsys.content.encoders.identity import check_identities
from recsys.data.schema import Schema, load_schema, load_vocabularies
from recsys.data.schema_columns import IdType
from recsys.data.transforms.chain import set_chain
from recsys.storage.location import Location

# Attributes of which `rows` decides, since they concern the rows of a table alone.
_ROW_ATTRIBUTES = ("num_embeddings", "vocabulary.kind", "vocabulary.num_hashes", "vocabulary.seed")
# Attributes that change how the model is trained or measured, but not what its weights mean.
_FREE_ATTRIBUTES = ("vocabulary.admit_after", "vocabulary.half_life", "loss", "nullable")


def reconciled_schema(
    source: Source, root: Location, differences: Differences, with_vocabularies: bool = True
) -> Schema:
    """Load a dataset's schema for a model that starts from a run."""
    trained, data = source.schema, load_schema(root, with_vocabularies=False)
    _take_fitted_values(trained, data, differences)
    _compare_columns(trained, data, differences)
    names = dict.fromkeys([*trained.columns, *data.columns])
    data.columns = {name: data.columns[name] for name in names if name in data.columns}
    for name, column in data.columns.items():
        first = trained.columns[name].parallel if name in trained.columns else []
        ordered = dict.fromkeys([*first, *column.parallel])
        column.parallel = [parallel for parallel in ordered if parallel in column.parallel]
    place = str(source.request.run / FILE)
    for table, id_type in trained.id_types.items():
        if data.vocabulary_of(table) is not None:
            data.id_types[table] = IdType(id_type.name, place)
    differences.check(source.model.folder)
    if with_vocabularies:
        load_vocabularies(data, root)
    return data


def _take_fitted_values(trained: Schema, data: Schema, differences: Differences) -> None:
    for name, chain in data.transforms.items():
        fitted = trained.transforms.get(name)
        if fitted is None or not fitted.is_fit_of(chain.without_fit) or fitted == chain:
            continue
        if chain.unfitted is None:
            differences.add(f"column '{name}'", "its transform was fitted anew", "fit of the run")
        data.transforms[name] = fitted
        set_chain(data.columns[name], fitted)


def _compare_columns(trained: Schema, data: Schema, differences: Differences) -> None:
    if trained.target_item != data.target_item:
        differences.refuse(
            "target_item",
            f"'{trained.target_item}' in the run, '{data.target_item}' in the data",
            "name the run's column, or train anew",
        )
    for change in changes("group", {"": trained.group}, {"": data.group}):
        differences.add("group", change, "measured by the data's")
    stored, current = described_columns(trained), described_columns(data)
    for name in dict.fromkeys([*stored, *current]):
        if name not in current:
            differences.add(name, "not in the data", "dropped")
        elif name not in stored:
            differences.add(name, "not in the run", "added")
        else:
            _compare_attributes(name, stored[name], current[name], differences)


def _compare_attributes(
    name: str, stored: dict[str, object], current: dict[str, object], differences: Differences
) -> None:
    for attribute in sorted(stored.keys() | current.keys()):
        values = stored.get(attribute), current.get(attribute)
        if values[0] == values[1] or attribute in _ROW_ATTRIBUTES:
            continue
        change = f"{attribute} was {short(values[0])}, is {short(values[1])}"
        if attribute in _FREE_ATTRIBUTES or attribute.split(".")[0] == "fill":
            differences.add(name, change, "as in the data")
        else:
            differences.refuse(name, change, "set it back, or give the column another name")


def compare_settings(source: Source, config: Config, differences: Differences) -> None:
    """List the settings that differ and change more than length and speed of training."""
    lacks_content = None in map(content_settings, (source.config.content, config.content))
    for name, stored, current in differing_settings(source.config, config):
        if name.startswith("content.") and lacks_content:
            continue
        change = f"was {short(stored)}, is {short(current)}"
        if name == "ranking.name" and source.request.takes("ranking."):
            differences.refuse(name, change, "set it back, or --warm-start.skip 'ranking.*'")
        else:
            differences.add(f"setting {name}", change, short(current))


def compare_encoders(
    source: Source, job: Job, takes: Callable[[str], bool], differences: Differences
) -> bool:
    """Return whether items are encoded as in the run; refuse used encoders that differ."""
    stored, current = content_settings(source.config.content), content_settings(job.config.content)
    if stored is None or current is None:
        return False
    settings = [name for name, *_ in differing_settings(source.config, job.config)]
    is_same = not any(name.startswith("content.") for name in settings)
    identities = encoder_identities(job)
    for name in stored.modalities.keys() & current.modalities.keys() & identities.keys():
        try:
            check_identities({name: identities[name]}, source.request.run)
        except ValueError as error:
            is_same = False
            prefixes = f"content.encoders.{name}.", f"content.projections.{name}."
            if any(takes(key) for key in job.model.state_dict() if key.startswith(prefixes)):
                fix = f"or --warm-start.skip 'content.*.{name}.*'"
                differences.refuse(f"content.modalities.{name}", str(error), fix)
    if is_same and source.model.manifest["frozen_weights"] != frozen_digest(job):
        differences.refuse(
            "frozen weights",
            "they are others, though encoders and settings are the same",
            "bring the run's encoders back, or train anew",
        )
    return is_same
