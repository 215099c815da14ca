"""What a table's configuration accepts, and what weights its table starts with."""

from typing import Any

import pytest
import torch

from embeddings import TableConfig, build_embedding_collection
from embeddings import tables as tables_module
from embeddings.tables import NormalInitializer, check_tables


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
    whole = initial_weights(config, seed=3)
    assert len({tuple(row.tolist()) for row in whole}) == 11
    shard = torch.full((6, 4), float("nan"))
    NormalInitializer(config).fill(shard, row_offset=3, column_offset=4)
    assert torch.equal(shard, whole[3:9, 4:8])


def test_an_initializer_refuses_a_shard_without_its_offsets() -> None:
    with pytest.raises(ValueError, match=r"embeddings\.sharders\(\)"):
        NormalInitializer(table())(torch.empty(5, 8))
