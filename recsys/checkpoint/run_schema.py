"""The schema that a run was trained on: kept in its folder, compared with that of other data.

`RUN/schema.yaml` has each column with every attribute that affects the meaning of its values, and
the type of raw ids. A run reads columns by name, in the order of this file, so their order in a
dataset's `schema.yaml` does not matter; a change of their meaning is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from embeddings.vocabulary.fixed import ExactVocabulary, integer_ids
from recsys.checkpoint.compatibility import check_equal, flattened
from recsys.config.parser import short
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.items.item_table import digest_of
from recsys.data.schema import Schema, load_schema, load_vocabularies, parse_schema
from recsys.data.schema_columns import VOCABULARY_SETTINGS, Column, IdType
from recsys.data.transforms.chain import set_chain
from recsys.distributed.ranks import Ranks
from recsys.storage.files import write_whole
from recsys.storage.location import Location

logger = logging.getLogger(__name__)

FILE = "schema.yaml"
WARM_START = "warm_start.json"  # the run that a run was begun from, and what differed
PARTITION = "partition.json"  # of a partition of a continual run, which has its own maps of ids
FIX = "bring it back, or train anew"
HEAD = "# The columns this run was trained on, in the order in which its model reads them.\n"


def write_run_schema(run: Path, schema: Schema) -> None:
    """Write the schema that a run is trained on, with the types of its raw ids."""
    content = {"schema": _plain(schema), "raw_ids": _raw_ids(schema)}
    write_whole(run / FILE, HEAD + yaml.safe_dump(content, sort_keys=False))


def load_run_schema(run: Path, with_vocabularies: bool = True) -> Schema | None:
    """Load the schema that a run was trained on; None for a run that did not keep it.

    Args:
        run: folder of the run.
        with_vocabularies: also load its exact maps of raw ids, and build its hashes.

    Raises:
        ValueError: the file is damaged, or a map is not the one of training.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        content = load_plain_yaml(path.read_bytes())
        types = {table: IdType(of["type"], str(path)) for table, of in content["raw_ids"].items()}
        schema = parse_schema(content["schema"], str(path))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({' '.join(str(error).split())}); bring it back, or train anew"
        ) from error
    schema.id_types.update(types)
    if with_vocabularies:
        load_vocabularies(schema, Location.of(run), FIX)
        stored, now = content["raw_ids"], _raw_ids(schema)
        for table in schema.tables_with("exact"):
            check_equal(f"vocabulary/{table}.parquet", stored[table], now[table], str(path))
    return schema


def schema_of_data(run: Path, root: Location, ranks: Ranks, goes_on: bool = False) -> Schema:
    """Load a dataset's schema for the model of a run: the run's columns, in the run's order.

    A run that kept no schema takes that of the dataset, with a warning.

    Args:
        run: folder of the run.
        root: the dataset.
        ranks: the ranks; the first one logs.
        goes_on: whether training continues; then a column that the run does not know is refused.
            Otherwise it is ignored, and the data's column of weights, if any, weighs the rows.

    Raises:
        ValueError: names each column, list and attribute that differs.
    """
    trained = load_run_schema(run, with_vocabularies=False)
    if trained is None:
        if ranks.is_first:
            logger.warning(
                f"{run / FILE}: no such file, as an earlier version started the run: whether "
                f"{root}/{FILE} and the items are those it was trained on could not be checked"
            )
        return load_schema(root)
    data = load_schema(root, with_vocabularies=False)
    # They are those of the run that it was begun from, or of a walk's first partition.
    keeps_fits = (run / WARM_START).is_file() or (run / PARTITION).is_file()
    for name, chain in data.transforms.items():
        own = trained.transforms.get(name)
        replaced = chain.without_fit if keeps_fits else chain
        if replaced.unfitted is not None and own is not None and own.is_fit_of(replaced):
            set_chain(data.columns[name], own)  # data without fitted values takes those of the run
    if not goes_on:
        _take_weights(trained, data)
    if differences := list(_differences(trained, data, goes_on)):
        raise ValueError(
            f"{root}/{FILE}: differs from {run / FILE}, on which the run was trained: "
            f"{'; '.join(differences)}. Set it back, give the data of the run, or train anew"
        )
    if (further := sorted(data.columns.keys() - trained.columns.keys())) and ranks.is_first:
        logger.info(
            "%s/%s: columns that the run does not know are not read: %s", root, FILE, further
        )
    trained.items = data.items  # read by the names in the configuration
    if (run / PARTITION).is_file():
        load_vocabularies(trained, Location.of(run), FIX)
    else:
        load_vocabularies(trained, root)
    return trained


def _take_weights(trained: Schema, data: Schema) -> None:
    """Take from the data what no prediction uses: weights, and which labels may be null."""
    columns = {name: of for name, of in trained.columns.items() if of.kind != "weight"}
    for name, column in columns.items():
        column.nullable = name in data.columns and data.columns[name].nullable
    own = {name: data.columns[name] for name in data.of_kind("weight")}
    trained.columns = own | columns  # a feature that is a weight in the data is refused


def agree_on_id_types(schema: Schema, ranks: Ranks) -> None:
    """Share the types of raw ids that any rank has read among all ranks. A collective.

    Raises:
        ValueError: on every rank: some ranks read integers and others strings.
    """
    for of_rank in ranks.gather(schema.id_types):
        for table, found in of_rank.items():
            known = schema.id_types.setdefault(table, found)
            if known.name != found.name:
                raise ValueError(
                    f"{found.place}: has {found.name} ids of '{table}', but {known.place} has "
                    f"{known.name} ids; write them with one type"
                )


def _plain(schema: Schema) -> dict[str, Any]:
    """Return a schema as the content of `schema.yaml`, with every default that may matter."""
    content = _without_empty(asdict(schema))
    for unwritten in ("vocabularies", "id_types", "transforms"):
        content.pop(unwritten, None)
    for column in content["columns"].values():
        if "vocabulary" in column:
            kept = ["kind", *VOCABULARY_SETTINGS[column["vocabulary"]["kind"]]]
            column["vocabulary"] = {name: column["vocabulary"][name] for name in kept}
    return content


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    of_parts = {key: _without_empty(part) for key, part in value.items()}
    return {key: of for key, of in of_parts.items() if of not in (None, [], {}) and of is not False}


def _raw_ids(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return, by table with a vocabulary, the type of its ids and the content of an exact map."""
    found: dict[str, dict[str, Any]] = {}
    for table, known in schema.id_types.items():
        found[table] = {"type": known.name}
        vocabulary = schema.vocabularies.get(table)
        if isinstance(vocabulary, ExactVocabulary):
            digest = digest_of(integer_ids(vocabulary.ids).tobytes())
            found[table] |= {"ids": len(vocabulary), "digest": digest}
    return found


def _differences(trained: Schema, data: Schema, goes_on: bool) -> Iterator[str]:
    """Describe each difference that changes what the model of a run reads."""
    for role in ("target_item", "group"):
        yield from changes(role, {"": getattr(trained, role)}, {"": getattr(data, role)})
    if trained.items is not None and data.items is not None:
        yield from changes("items", {"id": trained.items.id}, {"id": data.items.id})
        for name in trained.items.columns.keys() & data.items.columns.keys():
            kinds = trained.items.columns[name].kind, data.items.columns[name].kind
            yield from changes(f"item column '{name}'", {"kind": kinds[0]}, {"kind": kinds[1]})
    before, now = described_columns(trained), described_columns(data)
    for name in [*before, *(now.keys() - before.keys() if goes_on else ())]:
        if name not in before or name not in now:
            owner = "run" if name in before else "data"
            yield f"{name} is in the {owner}'s schema only"
        else:
            yield from changes(name, before[name], now[name])


def described_columns(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return the attributes of each column, and of each list beside a sequence, by its name."""
    found = {f"column '{name}'": _attributes(column) for name, column in schema.columns.items()}
    return found | {
        f"list '{name}'": {"beside": history.name}
        for history in schema.histories
        for name in (*history.numbers, *history.ids)
    }


def _attributes(column: Column) -> dict[str, Any]:
    attributes = flattened(asdict(column) | {"transform": dict(enumerate(column.transform))})
    attributes.pop("parallel", None)
    if column.kind == "label":
        attributes["loss"] = column.loss or "bce"
    return attributes


def changes(what: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield each attribute that differs, in words."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            thing = f"{what} {name}".rstrip()
            yield f"{thing} (run: {short(before.get(name))}, data: {short(now.get(name))})"
