"""Derives the ID tables from a configuration and a schema, and checks their placement."""

from collections.abc import Iterator
from dataclasses import astuple, replace

from embeddings import TableConfig
from embeddings.hardware import Hardware
from embeddings.tables import CACHE_LOAD_FACTOR
from recsys.config import (
    Config,
    EmbeddingSettings,
    HardwareSettings,
    ParallelSettings,
    TableSettings,
    content_settings,
    softmax_settings,
)
from recsys.config.embedding import NewRows
from recsys.data.negatives import negatives_feature
from recsys.data.schema import Schema


def pooled_features(settings: EmbeddingSettings, schema: Schema) -> list[str]:
    """Return columns looked up in pooled tables, in the order of the schema."""
    unpooled = (schema.target_item, *schema.event_columns)
    ids = [name for name, column in schema.columns.items() if column.kind in ("id", "ids")]
    pooled = [name for name in ids if name not in unpooled]
    return [name for name in pooled if schema.table_of(name) not in settings.skip]


def id_dropouts(settings: EmbeddingSettings, schema: Schema) -> dict[str, float]:
    """Return the dropout of each pooled feature's vectors, as its table sets it."""
    tables = settings.tables
    for name in schema.event_columns:
        if name != schema.target_item and tables.get(name, TableSettings()).id_dropout:
            raise ValueError(
                f"embedding.tables.{name}.id_dropout: '{name}' is a sequence or beside one; only "
                "pooled tables, such as the user's, and that of the target item have an id_dropout"
            )
    pooled, default = pooled_features(settings, schema), TableSettings()
    return {name: tables.get(schema.table_of(name), default).id_dropout for name in pooled}


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
    """Return the ID tables: one per ID column, except columns that share another's table.

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
    features: dict[str, list[str]] = {name: [] for name in tables}
    for column in [*pooled, *sequence]:
        features[schema.table_of(column)].append(column)
    if negatives:
        features[schema.target_item].append(negatives)
    lengths = list_lengths or {}
    return [_table_config(settings, schema, name, features[name], lengths) for name in tables]


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
    """Return `new_rows`, the initial values of untrained rows, by table, where not `random`."""
    rules: dict[str, NewRows] = {}
    for table, settings in config.embedding.tables.items():
        if settings.new_rows == "random":
            continue
        if problem := _row_problem(config, schema, table, settings):
            raise ValueError(
                f"embedding.tables.{table}.new_rows is {settings.new_rows}, but {problem}"
            )
        rules[table] = settings.new_rows
    return rules


def _row_problem(config: Config, schema: Schema, table: str, settings: TableSettings) -> str | None:
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


def check_placement(
    settings: EmbeddingSettings, schema: Schema, device: str, world_size: int, ranks_per_node: int
) -> None:
    """Refuse settings of kernels, prefetching and copies that do not fit the ranks of a job."""
    problems = [*_kernel_problems(settings, schema, device), *_prefetch_problems(settings, device)]
    if settings.parallel.copies > 1:
        problems += _copies_problems(settings, device, world_size, ranks_per_node)
    if problems:
        raise ValueError(f"embedding.{problems[0]}")


def scoring_config(config: Config, device: str) -> Config:
    """Return the configuration without settings that only training or only a GPU needs."""
    tables = config.embedding.tables
    if device == "cpu":
        tables = {
            name: replace(table, kernel="fused", cache_load_factor=None)
            for name, table in tables.items()
        }
    embedding = replace(
        config.embedding, tables=tables, prefetch=False, parallel=ParallelSettings()
    )
    return replace(config, embedding=embedding)


def planner_hardware(settings: HardwareSettings) -> Hardware:
    """Return the figures that settings give to the planner."""
    return Hardware(*astuple(settings))


def _kernel_problems(settings: EmbeddingSettings, schema: Schema, device: str) -> Iterator[str]:
    for name, table in settings.tables.items():
        where, kernel = f"tables.{name}", table.kernel
        if table.cache_load_factor is not None and kernel != "uvm_caching":
            yield (
                f"{where}.cache_load_factor is {table.cache_load_factor:g}, but kernel {kernel} "
                "has no cache; set kernel to uvm_caching, or leave it out"
            )
        if kernel != "fused" and device == "cpu":
            yield (
                f"{where}.kernel is {kernel}, but the device is cpu, which has no memory apart "
                "from the host's; set it to fused, or device to cuda on a machine with GPUs"
            )
        vocabulary = schema.vocabulary_of(name)
        if kernel == "uvm_caching" and vocabulary is not None and vocabulary.kind == "bounded":
            yield (
                f"{where}.kernel is uvm_caching, but a vocabulary of kind bounded resets rows "
                "within training, behind the cache; set it to uvm or fused, or choose kind exact"
            )


def _prefetch_problems(settings: EmbeddingSettings, device: str) -> Iterator[str]:
    if settings.prefetch and device == "cpu":
        yield (
            "prefetch is true, but the device is cpu; set it to false, or device to cuda on a "
            "machine with GPUs"
        )
    if settings.prefetch and all(t.kernel != "uvm_caching" for t in settings.tables.values()):
        yield (
            "prefetch is true, but no table has a cache to fetch into; set "
            "embedding.tables.X.kernel to uvm_caching, or it to false"
        )


def _copies_problems(
    settings: EmbeddingSettings, device: str, world_size: int, ranks_per_node: int
) -> Iterator[str]:
    copies = settings.parallel.copies
    where = f"parallel.copies is {copies}, but"
    if device == "cpu":
        yield f"{where} the device is cpu; set it to 1, or device to cuda on machines with GPUs"
    if ranks_per_node % copies:
        yield (
            f"{where} a node has {ranks_per_node} ranks, which it does not divide; set it to 1 or "
            "another divisor"
        )
    if copies == world_size:
        yield (
            f"{where} there are {world_size} ranks, so that no table would be sharded; set it "
            "lower, or add nodes"
        )
    optimizers = {"embedding.optimizer": settings.optimizer}
    for name, table in settings.tables.items():
        values = {
            "kernel": table.kernel != "fused" and table.kernel,
            "init_from": table.init_from is not None and "set",
            "new_rows": table.new_rows != "random" and table.new_rows,
        }
        for setting, value in values.items():
            if value:
                yield (
                    f"{where} embedding.tables.{name}.{setting} is {value}, which TorchRec's "
                    "copies do not allow; leave it out, or set it to 1"
                )
        if table.optimizer is not None:
            optimizers[f"embedding.tables.{name}.optimizer"] = table.optimizer
    for setting, optimizer in optimizers.items():
        if optimizer == "adam":
            yield (
                f"{where} {setting} is adam, whose state TorchRec does not average; choose "
                "another optimizer, or set it to 1"
            )
