"""Short runs of ranking backbones: trained, stopped, gone on with and evaluated, on some ranks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from recsys.build import build_job
from recsys.config import Config, ContentSettings, ranking_settings
from recsys.config.ranking import keys_of
from recsys.data.interactions import Interactions
from recsys.data.parquet.rows import ParquetRows
from recsys.data.vocabularies import UnknownIds
from recsys.evaluation.evaluate import score
from recsys.evaluation.predict import evaluate
from recsys.training.train import train
from tests.recsys.em3_runs import em3_config, ranks_of, round_tables, table_weights

Content = Literal["none", "concat", "qformer"]
CONTENTS: tuple[Content, ...] = ("none", "concat", "qformer")
# Backbones by a name of the test's own: those of the package, and the losses of retrieval.
BACKBONES: dict[str, dict[str, Any]] = {
    "din_dcn": {},
    "din": {},
    "dlrm": {},
    "dlrm_dcn": {},
    "deepfm": {},
    "sim": {"search_top_k": 2},
    "mmoe": {"num_experts": 2},
    "hstu": {"recent_items": 2},
    "transformer": {"recent_items": 2},
    "two_tower": {"temperature": 1.0},  # unsure enough to pass the check of the log loss
    "two_tower in_batch": {
        "loss": "in_batch_softmax",
        "all_ranks": True,
        "history_in_item_tower": True,
    },
    "two_tower sampled": {"loss": "sampled_softmax", "num_negatives": 7, "all_ranks": True},
    "two_tower full transformer": {
        "loss": "full_softmax",
        "history_encoder": "transformer",
        "history_in_item_tower": True,
        "history_half_lives": [0.5],
        "mlp_units": [],
        "exclude_seen": True,
    },
    "generative": {"code_levels": 2, "num_codes": 8, "beam_size": 50},
    "two_tower sampled hstu": {"loss": "sampled_softmax", "history_encoder": "hstu"},
}


# Settings of all of them, each of which a backbone may have or not.
SMALL: dict[str, Any] = {
    "attention_units": [8],
    "cross_layers": 1,
    "cross_rank": 4,
    "dense_units": [8],
    "mlp_units": [8],
    "tower_dim": 8,
    "sequence_dim": 8,
    "query_features": ["price"],
}


@dataclass
class Ran:
    """What a rank saw of a run that was stopped after 3 steps, and of one that was not."""

    steps: int
    stopped: dict[str, Any]  # test metrics of the run that stopped and went on
    straight: dict[str, Any]  # of the one that did not stop
    evaluated: dict[str, Any]  # of `evaluate` on the first


def backbone_config(folder: Path, backbone: str, content: Content, **settings: Any) -> Config:
    """The small EM3 with another backbone, and steps of 20 rows in all on two ranks."""
    name = backbone.split()[0]
    small = {key: value for key, value in SMALL.items() if key in keys_of(name)}
    ranking = ranking_settings(name, **(small | BACKBONES[backbone]))
    config = em3_config(folder, ranking=ranking, **settings)
    if content == "none":
        return replace(config, content="none")
    assert isinstance(config.content, ContentSettings)
    fusion = replace(config.content.fusion, name=content)
    return replace(config, content=replace(config.content, fusion=fusion))


def run_backbones(
    rank: int, world_size: int, folder: Path, cases: list[tuple[str, Content]]
) -> dict[tuple[str, Content], Ran]:
    """3 steps, a checkpoint, 3 more from it, and an evaluation, of each case."""
    return {case: _run(rank, world_size, folder, *case) for case in cases}


def _run(rank: int, world_size: int, folder: Path, backbone: str, content: Content) -> Ran:
    ranks, data = ranks_of(rank, world_size), str(folder / "data")
    out = folder / f"{backbone}-{content}-{world_size}".replace(" ", "_")
    settings = {"batch_size": 20 // world_size, "patience": 9}  # 60 rows: 3 steps
    config = backbone_config(folder, backbone, content, epochs=1, **settings)
    train(config, data, out / "stopped", ranks)
    longer = replace(config, epochs=2)
    stopped = train(longer, data, out / "stopped", ranks, resume="must")
    straight = train(longer, data, out / "straight", ranks)
    return Ran(
        stopped["train"]["steps"],
        stopped["test"],
        straight["test"],
        evaluate(out / "stopped", None, "test", ranks, "cpu"),
    )


def logits_by_plan(
    rank: int, world_size: int, folder: Path, backbones: list[str], plans: list[str]
) -> dict[tuple[str, str], Tensor]:
    """First logits of the test split, by backbone and sharding."""
    logits = {}
    for backbone in backbones:
        for plan in plans:
            config = backbone_config(folder, backbone, "qformer", sharding=plan, batch_size=10)
            job = build_job(config, str(folder / "data"), ranks_of(rank, world_size))
            round_tables(table_weights(job))
            rows = ParquetRows.of_split(job.root, "test", job.schema)
            interactions = Interactions(rows, job.batch_builder(), 10, rank, world_size)
            scored = score(job, interactions, unknown=UnknownIds(job.schema))
            logits[backbone, plan] = scored["logits"][scored["positions"].argsort()]
    return logits
