"""Tables are built as they are described, and their optimizers update rows as the formulas say."""

from typing import Any

import pytest
import torch
from torch import nn

from embeddings import TableConfig, build_embedding_collection, fuse_table_optimizers
from embeddings import tables as tables_module
from embeddings.tables import NormalInitializer, check_tables
from recsys.optimizer import DenseGroup, build_dense_optimizer
from recsys.optimizer.dense import dense_parameters, describe_optimizers
from tests.embeddings.tables_model import TablesModel, sharded_model, table_configs
from tests.ranks import run_on_ranks


def table(name: str = "item", **changes: Any) -> TableConfig:
    settings: dict[str, Any] = {"num_embeddings": 10, "embedding_dim": 8, "features": [name]}
    return TableConfig(name=name, **{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": []}, "table 'item': no features"),
        ({"features": ["a", "a"]}, "table 'item': feature 'a'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"sharding": "data_parallel"}, "sharding is 'data_parallel'.*auto"),
        ({"init_std": float("nan")}, "init_std is nan"),
    ],
)
def test_a_wrong_field_is_refused_with_its_value_and_the_fix(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


@pytest.mark.parametrize("name", ["", "a.b", "items", "type"])
def test_a_name_that_cannot_be_part_of_a_parameter_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"table '{name}'"):
        TableConfig(name=name, num_embeddings=3, embedding_dim=4, features=["f"])


def test_two_tables_of_one_name_are_refused_even_in_different_collections() -> None:
    twice = [table("item"), table("item", pooling="sum", features=["other"])]
    with pytest.raises(ValueError, match=r"table 'item'.*twice"):
        build_embedding_collection(twice)


def test_a_feature_on_two_tables_is_refused() -> None:
    with pytest.raises(ValueError, match=r"feature 'id'.*'a' and 'b'"):
        check_tables([table("a", features=["id"]), table("b", features=["id"])])


def test_tables_without_pooling_must_have_one_dimension() -> None:
    with pytest.raises(ValueError, match="table 'b' has embedding_dim 4 and table 'a' 8"):
        check_tables([table("a"), table("b", embedding_dim=4)])
    check_tables([table("a"), table("b", embedding_dim=4, pooling="sum")])


def initial_weights(config: TableConfig, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    weights = torch.empty(config.num_embeddings, config.embedding_dim)
    NormalInitializer(config)(weights)
    return weights


def test_initial_weights_follow_the_seed_and_the_table() -> None:
    weights = initial_weights(table("item"), seed=1)
    assert torch.equal(weights, initial_weights(table("item"), seed=1))
    assert not torch.equal(weights, initial_weights(table("item"), seed=2))
    assert not torch.equal(weights, initial_weights(table("user"), seed=1))


def test_a_shard_starts_with_its_rectangle_of_the_whole_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables_module, "INITIALIZATION_BLOCK_ROWS", 4)  # a shard crosses blocks
    config = table(num_embeddings=11)
    full_table = initial_weights(config, seed=3)
    assert len({tuple(row.tolist()) for row in full_table}) == 11
    shard = torch.full((6, 4), float("nan"))
    NormalInitializer(config).fill(shard, row_offset=3, column_offset=4)
    assert torch.equal(shard, full_table[3:9, 4:8])


def test_an_initializer_refuses_a_shard_without_its_offsets() -> None:
    with pytest.raises(ValueError, match=r"embeddings\.sharders\(\)"):
        NormalInitializer(table())(torch.empty(5, 8))


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


def test_a_table_that_is_not_sharded_steps_as_by_the_function_of_torch() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    config = TableConfig("item", 5, 4, ["item"], optimizer="sgd", learning_rate=0.5)
    ours, theirs = (build_embedding_collection([config], device="cpu") for _ in range(2))
    fuse_table_optimizers(ours, [config])
    (mine,), (other,) = ours.parameters(), theirs.parameters()
    _apply_optimizer_in_backward(torch.optim.SGD, [other], {"lr": 0.5})
    other.data.copy_(mine.data)
    old_weights = mine.detach().clone()
    for _ in range(2):
        for weight in (mine, other):
            (weight[:3] ** 2).sum().backward()
            assert weight.grad is None
    assert torch.equal(mine, other) and not torch.equal(mine, old_weights)
    for name in ("_optimizer_classes", "_optimizer_kwargs"):
        assert getattr(mine, name) == getattr(other, name)
    assert isinstance(mine._in_backward_optimizers[0], torch.optim.SGD)
