"""Derives the ID tables from a configuration and a schema."""

from __future__ import annotations

from embeddings import TableConfig
from embeddings.tables import CACHE_LOAD_FACTOR
from recsys.config import (
    Config,
    EmbeddingSettings,
    TableSettings,
    content_settings,
    softmax_settings,
)
from recsys.config.embedding import NewRows
from recsys.data.negatives import negatives_feature
from recsys.data.schema import Schema


def pooled_features(settings: EmbeddingSettings, schema: Schema) -> list[str]:
    """Return columns looked up in pooled tables, in the order of the schema."""
    return [
        name
        for name, column in schema.columns.items()
        if column.kind in ("id", "ids")
        and name not in (schema.target_item, *schema.event_columns)
        and schema.table_of(name) not in settings.skip
    ]


def id_dropouts(settings: EmbeddingSettings, schema: Schema) -> dict[str, float]:
    """Return the dropout of each pooled feature's vectors, as its table sets it."""
    tables = settings.tables
    for name in schema.event_columns:
        if name != schema.target_item and tables.get(name, TableSettings()).id_dropout:
            raise ValueError(
                f"embedding.tables.{name}.id_dropout: '{name}' is a sequence or beside one; only "
                "pooled tables, such as the user's, and that of the target item have an id_dropout"
            )
    return {
        name: tables.get(schema.table_of(name), TableSettings()).id_dropout
        for name in pooled_features(settings, schema)
    }


def target_dropout(config: Config, schema: Schema) -> float:
    """Return the share of a training batch's targets whose vector is dropped."""
    table = config.embedding.tables.get(schema.target_item, TableSettings())
    if table.id_dropout and softmax_settings(config.ranking) is not None:
        raise ValueError(
            f"embedding.tables.{schema.target_item}.id_dropout: retrieval compares a target with "
            "items that keep their vectors; set it to 0"
        )
    return table.id_dropout


def table_configs(
    config: Config, schema: Schema, list_lengths: dict[str, float] | None = None
) -> list[TableConfig]:
    """Return one table per column of ids that does not share another's.

    `list_lengths` has the mean number of ids per row, for columns that may have several.
    """
    settings = config.embedding
    pooled = pooled_features(settings, schema)
    sequence = [schema.target_item, *schema.event_columns]
    negatives = negatives_feature(softmax_settings(config.ranking), schema.target_item)
    tables = list(dict.fromkeys(schema.table_of(name) for name in [*pooled, *sequence]))
    for name in settings.tables:
        if name not in tables:
            raise ValueError(f"embedding.tables.{name}: the tables are {tables}; name one of them")
    for name in settings.skip:
        if name in sequence or schema.columns.get(name) is None:
            raise ValueError(
                f"embedding.skip: '{name}' is the target item, a sequence, a list beside one, or "
                "not in schema.yaml; name an id column whose vectors are summed"
            )
    cold_row_rules(config, schema)
    _check_bounded_items(config, schema)
    return [
        _table_config(
            settings,
            schema,
            name,
            [feature for feature in [*pooled, *sequence] if schema.table_of(feature) == name]
            + ([negatives] if negatives and name == schema.target_item else []),
            list_lengths or {},
        )
        for name in tables
    ]


def _check_bounded_items(config: Config, schema: Schema) -> None:
    if not schema.has_bounded_items:
        return
    content, softmax = content_settings(config.content), softmax_settings(config.ranking)
    where = f"'{schema.target_item}' has a vocabulary of kind bounded"
    if content is not None and content.encoder_share < 1:
        raise ValueError(
            f"content.encoder_share is {content.encoder_share}, but {where}: items without a row "
            "have no stored output; set it to 1, or choose kind exact"
        )
    if softmax is not None and softmax.loss in ("sampled_softmax", "full_softmax"):
        raise ValueError(
            f"ranking.loss is {softmax.loss}, but {where}, which does not keep the ids of all "
            "items; set in_batch_softmax, or choose kind exact"
        )


def _table_config(
    settings: EmbeddingSettings,
    schema: Schema,
    name: str,
    features: list[str],
    list_lengths: dict[str, float],
) -> TableConfig:
    defaults, table = settings, settings.tables.get(name, TableSettings())
    rate = defaults.learning_rate if table.learning_rate is None else table.learning_rate
    return TableConfig(
        name=name,
        num_embeddings=schema.limit(name),
        embedding_dim=table.embedding_dim or defaults.dim,
        features=features,
        pooling="none" if name in (schema.target_item, *schema.event_columns) else "sum",
        sharding=table.sharding or defaults.sharding,
        optimizer=table.optimizer or defaults.optimizer,
        learning_rate=rate,
        weight_decay=defaults.weight_decay if table.weight_decay is None else table.weight_decay,
        init_std=defaults.init_std,
        frozen=table.frozen,
        kernel=table.kernel,
        precision=table.precision or defaults.precision,
        cache_load_factor=table.cache_load_factor or CACHE_LOAD_FACTOR,
        ids_per_row={name: list_lengths[name] for name in features if name in list_lengths},
    )


def cold_row_rules(config: Config, schema: Schema) -> dict[str, NewRows]:
    """Return the rule of untrained rows, of each table with another one than `random`."""
    rules: dict[str, NewRows] = {}
    for table, settings in config.embedding.tables.items():
        if settings.new_rows == "random":
            continue
        if problem := _problem(config, schema, table, settings):
            raise ValueError(
                f"embedding.tables.{table}.new_rows is {settings.new_rows}, but {problem}"
            )
        rules[table] = settings.new_rows
    return rules


def _problem(config: Config, schema: Schema, table: str, settings: TableSettings) -> str | None:
    optimizer = settings.optimizer or config.embedding.optimizer
    vocabulary = schema.vocabulary_of(table)
    if settings.frozen:
        return "the table is frozen, so that no row is ever trained; set random"
    if settings.init_from is not None:
        return "init_from gives rows their first values, too; leave one of them out"
    if optimizer == "sgd":
        return (
            "optimizer sgd keeps no state that tells trained rows from others; choose another "
            "optimizer of the table"
        )
    if vocabulary is not None and vocabulary.kind == "bounded":
        return (
            "a vocabulary of kind bounded gives rows to ids within training, with initial "
            "weights; set random, or choose kind exact"
        )
    return None
