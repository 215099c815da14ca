"""The rules by which rows get values that no training step has updated: `new_rows` of a table."""

from __future__ import annotations

from recsys.config import Config, TableSettings, content_settings
from recsys.config.embedding import NewRows
from recsys.data.schema import Schema


def new_rows_rules(config: Config, schema: Schema) -> dict[str, NewRows]:
    """Return the rule of each table that has another one than `random`.

    Raises:
        ValueError: a rule does not fit its table; names setting, value and fix.
    """
    rules: dict[str, NewRows] = {}
    for table, own in config.embedding.tables.items():
        if own.new_rows == "random":
            continue
        if problem := _problem(config, schema, table, own):
            raise ValueError(f"embedding.tables.{table}.new_rows is {own.new_rows}, but {problem}")
        rules[table] = own.new_rows
    return rules


def _problem(config: Config, schema: Schema, table: str, own: TableSettings) -> str | None:
    """Return the reason why a rule does not fit its table, with the fix, or None."""
    optimizer = own.optimizer or config.embedding.optimizer
    vocabulary = schema.vocabulary_of(table)
    if own.frozen:
        return "the table is frozen, so that no row is ever trained; set random"
    if own.init_from is not None:
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
    if own.new_rows != "content":
        return None
    if table != schema.target_item:
        return f"only items of '{schema.target_item}' have content; set mean or random"
    if content_settings(config) is None:
        return "content is none; configure content, or set mean or random"
    return None
