"""Describes a run (memory, cost, traffic) from its meta model and a sample of the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from embeddings import format_plan, is_replicated
from embeddings.simulated_cluster import Cluster
from embeddings.table_memory import FLOAT
from recsys.config import Config, content_settings, softmax_settings
from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.communication import Sent, sent_bytes
from recsys.diagnostics.cost.model_sizes import ModelSizes
from recsys.diagnostics.cost.step_costs import COMMUNICATION, step_costs
from recsys.diagnostics.cost.work import PartCost
from recsys.diagnostics.plan.batch_sample import BatchSample, sample_batches
from recsys.diagnostics.plan.meta_model import MetaModel, build_meta_model
from recsys.diagnostics.plan.model_parts import (
    ModelPart,
    host_table_bytes,
    model_parts,
    table_bytes_by_rank,
)
from recsys.diagnostics.plan.time_bounds import TimeBound, backward_outputs, time_bounds
from recsys.kernels import choose_kernels


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds the most; `activations` are a lower estimate.

    host_tables: tables in host memory beside the rank's GPU, not part of the total.
    """

    tables: int
    dense: int
    bank: int
    activations: int
    limit: int
    host_tables: int = 0
    host_limit: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return self.tables + self.dense + self.bank + self.activations


@dataclass(frozen=True)
class Description:
    """Everything that `recsys describe` prints.

    costs: FLOPs and bytes of a step on one rank, by part, as if no two items had equal texts.
    sent: bytes that a rank sends to others in a step, by kind.
    frozen_layers: number of parameters that run only before training, by modality.
    cached_bytes: bytes of item content cached on disk, by modality, if no two items share theirs.
    unknown: parts whose FLOPs are not counted.
    """

    cluster: Cluster
    parts: list[ModelPart]
    table_bytes: list[int]  # by rank
    memory: RankMemory
    costs: list[PartCost]
    sent: list[Sent]
    bounds: list[TimeBound]
    counts: BatchCounts
    plan: str
    problems: list[str]
    frozen_layers: dict[str, int]
    cached_bytes: dict[str, int]
    unknown: list[str]
    sampled: str

    @property
    def step_seconds(self) -> float:
        """Return the least time of a step whose parts do not overlap."""
        return sum(bound.seconds for bound in self.bounds)

    def to_json(self) -> dict[str, Any]:
        """Return plain values by the names of the fields, and derived totals."""
        return {
            **asdict(self),
            "world_size": self.cluster.world_size,
            "parameters": sum(part.parameters for part in self.parts),
            "step_seconds": self.step_seconds,
            "samples_per_second": self.counts.rows * self.cluster.world_size / self.step_seconds,
            "bounds": [{**asdict(bound), "bound_by": bound.bound_by} for bound in self.bounds],
        }


def describe(
    config: Config, data: str, cluster: Cluster, rows: dict[str, int] | None = None
) -> Description:
    """Describe a run with this configuration on that cluster, without starting it.

    Args:
        config: configuration of the run.
        data: dataset, a folder or URL; a small sample of the real one is enough.
        cluster: the cluster, which need not exist.
        rows: numbers of rows for tables, by column, that replace those of the dataset.

    Raises:
        ValueError: the configuration does not match the data.

    Example::

        cluster = Cluster(nodes=8, ranks_per_node=8, device=DEVICES["h100"])
        describe(load_config("shop.yaml"), "shop", cluster, {"product": 4_000_000_000}).problems
    """
    meta_model = build_meta_model(config, data, cluster, rows)
    sample = sample_batches(meta_model)
    sizes, counts = _sizes(meta_model, sample), sample.counts
    costs = [
        part
        for part in step_costs(sizes, counts, cluster.world_size)
        if part.name != COMMUNICATION  # listed by kind
    ]
    sent = sent_bytes(sizes, counts, cluster.world_size)
    parts = model_parts(
        meta_model.em3, meta_model.tables, meta_model.plan, cluster.world_size, config.optimizer
    )
    sharing = cluster.world_size // config.embedding.parallel.copies
    table_bytes = table_bytes_by_rank(meta_model.tables, meta_model.plan, sharing)
    return Description(
        cluster=cluster,
        parts=parts,
        table_bytes=table_bytes,
        memory=_memory(meta_model, parts, table_bytes, costs),
        costs=costs,
        sent=sent,
        bounds=time_bounds(costs, sent, cluster, config.precision),
        counts=counts,
        plan=format_plan(meta_model.plan, meta_model.tables),
        problems=meta_model.problems,
        frozen_layers=meta_model.frozen_layers,
        cached_bytes=_cached_bytes(meta_model),
        unknown=_unknown(config, sizes),
        sampled=_sampled(meta_model, sample),
    )


def _sizes(meta_model: MetaModel, sample: BatchSample) -> ModelSizes:
    """Count the sizes on CPU, by the configuration's kernels, which the process then has."""
    choose_kernels("torch" if meta_model.config.kernels == "torch" else "auto")
    lengths = [len(batch.history_index) for batch in sample.batches]
    typical = min(sample.batches, key=lambda b: abs(len(b.history_index) - fmean(lengths)))
    model = meta_model.em3, meta_model.tables, meta_model.plan
    return ModelSizes.of(meta_model.config, meta_model.schema, *model, typical)


def _unknown(config: Config, sizes: ModelSizes) -> list[str]:
    modalities = sizes.content.modalities if sizes.content is not None else []
    found = [f"encoder {modality.name}" for modality in modalities if not modality.is_known]
    on_host = [name for name, t in config.embedding.tables.items() if t.kernel != "fused"]
    found += [f"time of reads of table {name} from host memory" for name in on_host]
    return found + ["retrieval loss"] * (softmax_settings(config.ranking) is not None)


def _memory(
    meta_model: MetaModel, parts: list[ModelPart], table_bytes: list[int], costs: list[PartCost]
) -> RankMemory:
    cluster, content, bank = meta_model.cluster, meta_model.em3.content, 0
    if content is not None and content.bank is not None:
        settings = content_settings(meta_model.config)
        assert settings is not None
        rows, dim = meta_model.schema.num_items, content.bank.dim
        if not is_replicated(rows, dim, cluster.world_size, settings.history.bank):
            rows = -(-rows // cluster.world_size)
        bank = FLOAT * rows * (dim + 1)
    return RankMemory(
        tables=max(table_bytes),
        dense=sum(part.bytes for part in parts if part.where == "every rank"),
        bank=bank,
        activations=round(backward_outputs(costs)),
        limit=cluster.device.memory_bytes,
        host_tables=host_table_bytes(meta_model.tables, meta_model.plan, len(table_bytes)),
        host_limit=cluster.device.host_memory_bytes,
    )


def _cached_bytes(meta_model: MetaModel) -> dict[str, int]:
    """Return the bytes of the frozen layers' outputs of distinct items, by modality."""
    items, content = meta_model.items, meta_model.em3.content
    if items is None or content is None:
        return {}
    found = {}
    for name in meta_model.frozen_layers:
        encoder: Any = content.encoders[name]
        tokens = float(meta_model.tokens(name).double().mean()) * items.num_items
        found[name] = round(encoder.frozen_dtype.itemsize * encoder.output_dim * tokens)
    return found


def _sampled(meta_model: MetaModel, sample: BatchSample) -> str:
    text = f"{sample.looked_at:,} of {sample.num_rows:,} training rows"
    if meta_model.items is not None:
        text += f" and {meta_model.items.looked_at:,} of {meta_model.items.num_items:,} items"
    return text
