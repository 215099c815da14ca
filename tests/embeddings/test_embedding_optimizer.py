"""Who updates which parameter: never two optimizers, never the wrong one, never none."""

from typing import Any

import pytest
from torch import nn

from embeddings import TableConfig, fuse_table_optimizers
from recsys.optimizer import (
    DenseGroup,
    build_dense_optimizer,
    dense_parameters,
    describe_optimizers,
)
from tests.embeddings.tables_model import TablesModel, sharded_model, table_configs
from tests.ranks import run_on_ranks


class ContentModel(TablesModel):
    """Tables, a dense layer, an encoder with a norm, and a frozen part."""

    def __init__(self, tables: list[TableConfig], device: str = "meta") -> None:
        super().__init__(tables, device)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.LayerNorm([2, 3]))
        self.frozen = nn.Linear(5, 7).requires_grad_(False)


GROUPS = [
    DenseGroup("encoder", ["encoder."], learning_rate=0.1, weight_decay=0.5),
    DenseGroup("rest", [""], learning_rate=0.2),
]
DENSE_NAMES = {
    "dense.weight",
    "dense.bias",
    *(f"encoder.{layer}.{name}" for layer in range(3) for name in ("weight", "bias")),
}


def fused_model(tables: list[TableConfig]) -> ContentModel:
    model = ContentModel(tables, "cpu")
    fuse_table_optimizers(model, tables)
    return model


def test_groups_carry_their_settings_and_only_matrices_decay() -> None:
    model = fused_model(table_configs())
    _, adamw = build_dense_optimizer(model, GROUPS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {
        names[id(parameter)]: (group["name"], group["lr"], group["weight_decay"])
        for group in adamw.param_groups
        for parameter in group["params"]
    }
    encoder_without_decay = ("encoder", 0.1, 0.0)
    assert settings.pop("encoder.0.weight") == ("encoder", 0.1, 0.5)
    assert settings.pop("dense.weight") == ("rest", 0.2, 0.0)
    assert settings.pop("dense.bias") == ("rest", 0.2, 0.0)
    # The weight of the last norm is a matrix, and still a norm's.
    assert set(settings.values()) == {encoder_without_decay}


def test_a_parameter_without_group_is_named() -> None:
    with pytest.raises(ValueError, match=r"'dense.weight' \(2 "):
        build_dense_optimizer(fused_model(table_configs()), GROUPS[:1])


def test_a_table_without_fused_optimizer_does_not_fall_to_the_dense_one() -> None:
    with pytest.raises(ValueError, match=r"'bags\.embedding_bags\.user\.weight'"):
        build_dense_optimizer(ContentModel(table_configs(), "cpu"), GROUPS)


def test_a_model_with_nothing_dense_to_train_is_refused() -> None:
    tables = table_configs()
    model = fused_model(tables)
    model.encoder.requires_grad_(False)
    model.dense.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        build_dense_optimizer(model, GROUPS)


def describe_sharded(rank: int, world_size: int) -> dict[str, Any]:
    tables = table_configs("table_wise", "rowwise_adagrad", learning_rate=0.25)
    sharded = sharded_model(tables, ContentModel(tables))
    combined, adamw = build_dense_optimizer(sharded, GROUPS)
    rates = {name.split(".")[-2] for name in sharded.fused_optimizer.params}
    return {
        "description": describe_optimizers(sharded, tables, adamw),
        "dense": set(dense_parameters(sharded)),
        "fused tables here": rates,
        "fused rates": {group["lr"] for group in sharded.fused_optimizer.param_groups},
        "combined": set(combined.params),
    }


def test_sharding_leaves_every_parameter_with_its_optimizer() -> None:
    ranks = run_on_ranks(describe_sharded, 2)
    tables = table_configs("table_wise", "rowwise_adagrad", learning_rate=0.25)
    unsharded = fused_model(tables)
    expected = describe_optimizers(unsharded, tables, build_dense_optimizer(unsharded, GROUPS)[1])
    assert [" ".join(line.split()) for line in expected.splitlines()[2:]] == [
        "table user 1 80 rowwise_adagrad (fused) 0.25 0",
        "table tags 1 24 rowwise_adagrad (fused) 0.25 0",
        "table item 1 56 rowwise_adagrad (fused) 0.25 0",
        "encoder 1 24 AdamW 0.1 0.5",
        "encoder 5 30 AdamW 0.1 0",
        "rest 2 33 AdamW 0.2 0",
        "frozen 2 42 none - -",
        "total 13 289",
    ]
    for rank in ranks:
        assert rank["description"] == expected
        assert rank["dense"] == DENSE_NAMES
        assert rank["dense"] < rank["combined"]
        assert rank["fused rates"] == {0.25}
    assert set.union(*(rank["fused tables here"] for rank in ranks)) == {"user", "tags", "item"}
