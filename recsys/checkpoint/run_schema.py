"""The schema that a run was trained on: kept in `RUN/schema.yaml`, compared with other data."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from embeddings.vocabulary.fixed import ExactVocabulary, integer_ids
from recsys.checkpoint.compatibility import check_equal, differing, flattened
from recsys.config.parser import short
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.items.item_table import digest_of
from recsys.data.prepare import new_ids
from recsys.data.schema import Schema, load_schema, load_vocabularies, parse_schema
from recsys.data.schema_columns import VOCABULARY_SETTINGS, Column, IdType
from recsys.data.transforms.chain import set_chain
from recsys.distributed.ranks import Ranks
from recsys.storage.files import atomic_write, read_json, regular_file
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
    if schema.grown:
        content["grown"] = schema.grown
    atomic_write(run / FILE, HEAD + yaml.safe_dump(content, sort_keys=False))


def load_run_schema(run: Path, with_vocabularies: bool = True) -> Schema:
    """Load the schema that a run was trained on, with its maps of raw ids; damage is an error."""
    path = run / FILE
    try:
        content = load_plain_yaml(regular_file(path).read_bytes())
        types = {
            table: IdType(stored["type"], str(path)) for table, stored in content["raw_ids"].items()
        }
        schema = parse_schema(content["schema"], str(path))
        schema.grown.update(content.get("grown", {}))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); {FIX}"
        ) from error
    schema.id_types.update(types)
    if with_vocabularies:
        load_vocabularies(schema, Location.of(run), FIX, is_of_run=True)
        stored, current = content["raw_ids"], _raw_ids(schema)
        for table in schema.tables_with("exact"):
            check_equal(f"vocabulary/{table}.parquet", stored[table], current[table], str(path))
    return schema


def schema_of_data(run: Path, root: Location, ranks: Ranks, is_resumed: bool = False) -> Schema:
    """Load a dataset's schema for the model of a run: the run's columns, in the run's order.

    Further columns are refused if training goes on, else ignored. A ValueError lists differences.
    """
    trained = load_run_schema(run, with_vocabularies=False)
    data = load_schema(root, with_vocabularies=False)
    # The run has the fits of the run that it started from, or of the first partition.
    is_partition = (run / PARTITION).is_file()
    keeps_fits = (run / WARM_START).is_file() or is_partition
    for name, chain in data.transforms.items():
        fitted = trained.transforms.get(name)
        replaced = chain.without_fit if keeps_fits else chain
        if replaced.unfitted is not None and fitted is not None and fitted.is_fit_of(replaced):
            set_chain(data.columns[name], fitted)  # data without fitted values takes the run's
    for table in set(trained.tables_with("exact")) & set(data.tables_with("exact")):
        # The data's tables may have grown since; the next partition uses their new rows.
        is_larger = data.limit(table) > trained.limit(table)
        if table in trained.grown or (is_partition and is_larger):
            data.columns[table].num_embeddings = trained.limit(table)
    if not is_resumed:
        _take_weights(trained, data)
    if differences := list(_differences(trained, data, is_resumed)):
        raise ValueError(
            f"{root}/{FILE}: differs from {run / FILE}, on which the run was trained: "
            f"{'; '.join(differences)}. Set it back, give the data of the run, or train anew"
        )
    if (extra := sorted(data.columns.keys() - trained.columns.keys())) and ranks.is_first:
        logger.info("%s/%s: columns that the run does not know are not read: %s", root, FILE, extra)
    trained.items = data.items  # read by the names in the configuration
    trained.features = data.features
    if is_partition:
        load_vocabularies(trained, Location.of(run), FIX, is_of_run=True)
        return trained
    for table, count in load_vocabularies(trained, root, is_of_run=True).items():
        if ranks.is_first:
            logger.info(
                f"{root}: {count:,} ids of '{table}' came after the run's table was full, and are "
                f"unknown to it; train anew with --warm-start {run} to give them rows"
            )
    return trained


def _take_weights(trained: Schema, data: Schema) -> None:
    """Take from the data what no prediction uses: weights, and which labels may be null."""
    columns = {name: data.columns[name] for name in data.of_kind("weight")}
    for name, column in trained.columns.items():
        if column.kind != "weight":  # a feature that is a weight in the data is refused
            column.nullable = name in data.columns and data.columns[name].nullable
            columns[name] = column
    trained.columns = columns


def agree_on_id_types(schema: Schema, ranks: Ranks) -> None:
    """Share types of raw ids among all ranks; two types in a table are an error. A collective."""
    for id_types in ranks.gather(schema.id_types):
        for table, id_type in id_types.items():
            first = schema.id_types.setdefault(table, id_type)
            if first.name != id_type.name:
                raise ValueError(
                    f"{id_type.file}: has {id_type.name} ids of '{table}', but {first.file} has "
                    f"{first.name} ids; write them with one type"
                )


def add_new_items(run: Path, schema: Schema, root: Location) -> str:
    """Append a dataset's new items to the maps of ids, if the run is that of a partition.

    New items have content, but untrained table rows. Returns the folder of the dataset with the
    run's training rows; a table with too few rows is a ValueError.
    """
    if not (run / PARTITION).is_file():
        return "train"
    exact = exact_maps(schema)
    for table, ids in new_ids(root, schema, None, exact).items():
        if len(exact[table]) + len(ids) > exact[table].unknown_row:
            raise ValueError(
                f"{root}/items: {len(ids):,} items are new, and table '{table}' of {run} has room "
                f"for {exact[table].unknown_row - len(exact[table]):,}; `recsys continual` gives "
                "them rows with the next partition, or remove them"
            )
        exact[table].extend([ids])
    return f"train/{read_json(run / PARTITION)['name']}"


def exact_maps(schema: Schema) -> dict[str, ExactVocabulary]:
    """Return the maps of raw ids that are loaded, by table, without hashes."""
    vocabularies = schema.vocabularies.items()
    return {table: ids for table, ids in vocabularies if isinstance(ids, ExactVocabulary)}


def _plain(schema: Schema) -> dict[str, Any]:
    """Return a schema as the content of `schema.yaml`, with every default that may matter."""
    content = _without_empty(asdict(replace(schema)))  # without what is loaded beside the file
    for column in content["columns"].values():
        if "vocabulary" in column:
            names = ["kind", *VOCABULARY_SETTINGS[column["vocabulary"]["kind"]]]
            column["vocabulary"] = {name: column["vocabulary"][name] for name in names}
    return content


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _without_empty(item) for key, item in value.items()}
    return {  # a seed of 0 stays, though it is equal to False
        key: item for key, item in items.items() if item not in (None, [], {}) and item is not False
    }


def _raw_ids(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return, by table with a vocabulary, the type of its ids and the content of an exact map."""
    raw_ids: dict[str, dict[str, Any]] = {}
    for table, id_type in schema.id_types.items():
        raw_ids[table] = {"type": id_type.name}
        vocabulary = schema.vocabularies.get(table)
        if isinstance(vocabulary, ExactVocabulary):
            digest = digest_of(integer_ids(vocabulary.ids).tobytes())
            raw_ids[table] |= {"ids": len(vocabulary), "digest": digest}
    return raw_ids


def _differences(trained: Schema, data: Schema, is_resumed: bool) -> Iterator[str]:
    for role in ("target_item", "group"):
        yield from changes(role, {"": getattr(trained, role)}, {"": getattr(data, role)})
    if trained.items is not None and data.items is not None:
        yield from changes("items", {"id": trained.items.id}, {"id": data.items.id})
        for name in trained.items.columns.keys() & data.items.columns.keys():
            kinds = trained.items.columns[name].kind, data.items.columns[name].kind
            yield from changes(f"item column '{name}'", {"kind": kinds[0]}, {"kind": kinds[1]})
    stored, current = described_columns(trained), described_columns(data)
    for name in [*stored, *(current.keys() - stored.keys() if is_resumed else ())]:
        if name not in stored or name not in current:
            owner = "run" if name in stored else "data"
            yield f"{name} is in the {owner}'s schema only"
        else:
            yield from changes(name, stored[name], current[name])


def described_columns(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return the attributes of each column, and of each list beside a sequence, by its name."""
    columns = {f"column '{name}'": _attributes(column) for name, column in schema.columns.items()}
    return columns | {
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


def changes(subject: str, stored: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Yield a text for each attribute that differs."""
    for name, old_value, new_value in differing(stored, current):
        yield f"{f'{subject} {name}'.rstrip()} (run: {short(old_value)}, data: {short(new_value)})"
