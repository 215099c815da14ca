"""Compares a partition's columns, settings and items with those of earlier partitions."""

import logging

import pyarrow as pa

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.compatibility import differing_settings
from recsys.checkpoint.item_content import changed_items
from recsys.checkpoint.run_schema import exact_maps
from recsys.checkpoint.warm_start.plan import WarmStartPlan
from recsys.checkpoint.warm_start.source import Source
from recsys.config import Config
from recsys.data.prepare import fit_chains, new_ids
from recsys.data.schema import Schema, build_hashes, format_growth, read_schema, vocabulary_file
from recsys.data.schema_columns import MAX_ROWS
from recsys.data.transforms.chain import set_chain
from recsys.distributed.ranks import Ranks
from recsys.storage.location import Location
from recsys.training.continual.partitions import Partition
from recsys.training.initial_state import new_item_rows

logger = logging.getLogger(__name__)

NewIds = dict[str, pa.Array]  # by table with an exact map
# Rules of a warm start under which a column keeps its meaning.
UNCHANGED_RULES = ("as in the data", "fit of the run")


def require_unchanged(source: Source, config: Config, root: Location) -> None:
    """Refuse columns or settings that a warm start would reconcile, but that redefine the model."""
    changes = [
        f"{difference.part}: {difference.what}"
        for difference in source.differences.reconciled
        if difference.rule not in UNCHANGED_RULES
    ]
    for name, previous, current in differing_settings(source.config, config):
        changes.append(f"{name} was {previous}, is {current}")
    if changes:
        raise ValueError(
            f"{root}/schema.yaml or settings: differ from those of {source.request.run}: "
            f"{'; '.join(changes)}. Set them back, or start another run from it: --out NEW "
            f"--warm-start {source.request.run.parents[1]}"
        )


def new_schema(
    root: Location, partition: Partition, previous: tuple[Schema, Schema] | None, ranks: Ranks
) -> tuple[Schema, NewIds]:
    """Return the schema as the previous model reads it, and the partition's new ids.

    `previous` has the data's schema without maps, and that of the previous run. Data that cannot be
    read is a ValueError on every rank. A collective.
    """
    with ranks.raise_on_all_ranks():
        if previous is None:
            schema, maps = read_schema(root), {}
            for table in schema.tables_with("exact"):
                if (file := vocabulary_file(root, table)).exists():
                    maps[table] = ExactVocabulary.load(file.path, MAX_ROWS, file.arrow)
        else:
            schema, maps = previous[0], exact_maps(previous[1])
            # The dataset's own fits may be of later partitions.
            for name, chain in read_schema(root).transforms.items():
                if schema.transforms[name] != previous[1].transforms.get(name):
                    schema.transforms[name] = chain
        for table in schema.tables_with("exact"):
            vocabulary = maps.get(table, ExactVocabulary(MAX_ROWS))
            schema.vocabularies[table] = vocabulary.resized(MAX_ROWS)
        build_hashes(schema)
        if ranks.is_first:
            fit_chains(root, schema, partition.folder)
    for name, chain in ranks.from_first(schema.transforms).items():
        schema.transforms[name] = chain
        set_chain(schema.columns[name], chain)
    maps = exact_maps(schema)
    add_ids(schema, ranks.on_first(new_ids, root, schema, None, maps), ranks)
    ids = ranks.on_first(new_ids, root, schema, partition.folder, maps)
    _size_tables(schema, ids, None if previous is None else previous[1])
    for line in format_growth(schema) if ranks.is_first else ():
        logger.info(line)
    return schema, ids


def _size_tables(schema: Schema, ids: NewIds, previous: Schema | None) -> None:
    """Enlarge tables for the new ids of a partition; never make a table smaller."""
    for table, vocabulary in exact_maps(schema).items():
        rows = schema.limit(table)
        if previous is not None and table in previous.grown and previous.limit(table) > rows:
            schema.grown[table] = rows
            schema.columns[table].num_embeddings = previous.limit(table)
        schema.make_room(table, len(vocabulary) + len(ids[table]))
        schema.vocabularies[table] = vocabulary.resized(schema.limit(table))


def add_ids(schema: Schema, ids: NewIds, ranks: Ranks) -> None:
    """Append new ids to the maps, which gives them rows after the known ids'. A collective."""
    with ranks.raise_on_all_ranks():
        for table, vocabulary in exact_maps(schema).items():
            vocabulary.extend([ids[table]])


def check_items(job: Job, plan: WarmStartPlan) -> None:
    """Raise a ValueError if so many items changed that ids seem reassigned. A collective."""
    if plan.items is None:
        return
    source, allowed = plan.source, job.config.continual.edited_items
    new_rows = new_item_rows(job, plan)
    with job.ranks.raise_on_all_ranks():
        changed = changed_items(job, source.request.run, source.model.manifest, new_rows)
        if changed is not None and changed.edited > allowed * changed.num_known:
            raise ValueError(
                f"{job.root}/items: {changed.edited:,} of {changed.num_known:,} known items have "
                f"other content than in {source.request.run}, a larger share than {allowed:g}: "
                "their ids seem to mean other items now; bring the ids back, or set "
                "--continual.edited-items 1 if the texts or pictures were revised"
            )
