"""Builds a meta model: everything that a run builds, without weights, data or devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa
import torch
from torchrec.distributed.types import ShardingPlan

from embeddings import MemoryBank, TableConfig, fuse_table_optimizers, plan_sharding, sharders
from embeddings.simulated_cluster import Cluster, RankTime, slowest_rank
from embeddings.table_memory import what_does_not_fit
from recsys.config import Config, ModalitySettings, content_settings
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.content.kinds.feature import Feature
from recsys.data.items.content_store import require_column
from recsys.data.items.item_column import FeatureFile
from recsys.data.items.item_values import feature_tokens
from recsys.data.items.kind import make_kind
from recsys.data.parquet.file import READ_ERRORS, column_type, mean_list_lengths, open_parquet
from recsys.data.parquet.values import list_lengths
from recsys.data.schema import Schema, load_schema
from recsys.model.build import build_em3
from recsys.model.em3 import EM3
from recsys.model.placement import check_placement, planner_hardware
from recsys.model.tables import table_configs
from recsys.storage.location import Location

# More bytes than any table needs: for the plan of devices with unlimited memory.
NO_LIMIT = 2**60
SAMPLED_ITEMS = 2048


@dataclass(frozen=True)
class MetaModel:
    """Everything that a run would build.

    frozen_layers: by encoder with cached outputs, the parameters that run only before training.
    times: of a step's tables, as TorchRec expects them on GPUs; None on CPU.
    problems: why the tables do not fit, with fixes; the plan is then for unlimited memory.
    """

    config: Config
    root: Location
    schema: Schema
    cluster: Cluster
    tables: list[TableConfig]
    em3: EM3
    frozen_layers: dict[str, int]
    plan: ShardingPlan
    times: RankTime | None
    problems: list[str]


def build_meta_model(
    config: Config, data: str, cluster: Cluster, rows: dict[str, int] | None = None
) -> MetaModel:
    """Read the schema and a few items, build the model and plan its sharding; see `describe`."""
    root = Location.of(data)
    schema = load_schema(root)
    _resize(schema, rows or {})
    figures = planner_hardware(config.embedding.hardware).or_else(cluster.device.hardware)
    cluster = replace(cluster, device=replace(cluster.device, hardware=figures))
    sizes = cluster.world_size, cluster.ranks_per_node
    check_placement(config.embedding, schema, cluster.device.kind, *sizes)
    tables = table_configs(config, schema, mean_list_lengths(root, schema))
    content = content_settings(config.content)
    encoders, frozen_layers = {}, {}
    bank: MemoryBank | None = None
    if content is not None:
        widths = feature_widths(root, schema, content.modalities)
        for name, modality in content.modalities.items():
            encoders[name] = _meta_encoder(name, modality, widths.get(name))
            if encoders[name].caches and modality.cache_frozen_layers:
                frozen_layers[name] = _drop_frozen_layers(encoders[name])
        if content.history.mode != "full":
            bank = MemoryBank(schema.num_items, content.vector_dim, "meta")
    em3 = build_em3(config, schema, tables, encoders, bank)
    fuse_table_optimizers(em3, tables)
    plan, problems = _plan(config, em3, tables, cluster)
    times = None if cluster.device.kind == "cpu" else _times(config, em3, tables, cluster, plan)
    return MetaModel(
        config, root, schema, cluster, tables, em3, frozen_layers, plan, times, problems
    )


def _resize(schema: Schema, rows: dict[str, int]) -> None:
    for name, number in rows.items():
        column = schema.columns.get(name)
        if column is None or column.num_embeddings is None:
            tables = [n for n, c in schema.columns.items() if c.num_embeddings is not None]
            raise ValueError(f"rows: '{name}' has no table; the tables are {tables}")
        if number < 1:
            raise ValueError(f"rows: table '{name}' with {number} rows; give at least 1")
        column.num_embeddings = number


def feature_widths(
    root: Location, schema: Schema, modalities: dict[str, ModalitySettings]
) -> dict[str, int]:
    """Return the widths of stored features; a column that training refuses is a ValueError."""
    folder = root / "items"
    if schema.items is None:
        raise ValueError(f"{root}/schema.yaml: a model with content needs `items`; add them")
    file = next(filter(_has_rows, folder.files(".parquet")), None)
    if file is None:
        raise ValueError(f"{folder}: no *.parquet files with rows; write one row per item there")
    widths = {}
    for name, modality in modalities.items():
        kind = make_kind(f"content.modalities.{name}", modality)
        require_column(schema.items, kind)
        if (stored := schema.items.columns[modality.column].file) is not None:
            widths[name] = FeatureFile(root / stored).width
            continue
        values, where = _first_values(file, modality.column), f"{file}: column '{modality.column}'"
        kind.lengths(values, where)  # raises if training would
        if isinstance(kind, Feature):
            _, tokens = feature_tokens(values, where)
            if len(tokens):
                widths[name] = int(list_lengths(tokens)[0])
    return widths


def _has_rows(file: Location) -> bool:
    with open_parquet(file) as parquet:
        return parquet.metadata.num_rows > 0


def _first_values(file: Location, column: str) -> pa.Array:
    try:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, column)
            return next(parquet.iter_batches(SAMPLED_ITEMS, columns=[column])).column(0)
    except READ_ERRORS as error:
        raise ValueError(f"{file}: column '{column}' cannot be read ({error})") from error


def _meta_encoder(name: str, modality: ModalitySettings, width: int | None) -> Encoder:
    if modality.module:  # user code, which may do anything with its weights
        return build_encoder(name, modality)
    with torch.device("meta"):
        return build_encoder(name, modality, width)


def _drop_frozen_layers(encoder: Encoder) -> int:
    before = sum(parameter.numel() for parameter in encoder.parameters())
    encoder.drop_frozen_layers()
    return before - sum(parameter.numel() for parameter in encoder.parameters())


def _plan(
    config: Config, em3: EM3, tables: list[TableConfig], cluster: Cluster
) -> tuple[ShardingPlan, list[str]]:
    types, copies = config.embedding.communication, config.embedding.parallel.copies

    def plan_on(where: Cluster) -> ShardingPlan:
        return plan_sharding(
            em3,
            tables,
            device=where.device.kind,
            batch_size=config.batch_size,
            topology=where.topology(copies),
            module_sharders=sharders(types.forward, types.backward),
            prefetch=config.embedding.prefetch,
            copies=copies,
            hardware=where.device.hardware,
        )

    try:
        return plan_on(cluster), []
    except ValueError as error:
        device = replace(cluster.device, memory_bytes=NO_LIMIT, host_memory_bytes=NO_LIMIT)
        plan = plan_on(replace(cluster, device=device))  # raises if memory is not the cause
        lines = what_does_not_fit(
            tables,
            cluster.device.memory_bytes,
            cluster.world_size // copies,
            cluster.device.host_memory_bytes if cluster.device.kind == "cuda" else 0,
            cluster.device.hardware.reserved_share,
        )
        return plan, lines or [str(error)]


def _times(
    config: Config, em3: EM3, tables: list[TableConfig], cluster: Cluster, plan: ShardingPlan
) -> RankTime:
    settings = config.embedding
    types, topology = settings.communication, cluster.topology(settings.parallel.copies)
    wires = sharders(types.forward, types.backward)
    return slowest_rank(em3, tables, plan, topology, wires, config.batch_size, settings.prefetch)
