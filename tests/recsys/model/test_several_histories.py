"""Histories after the first one: looked up, encoded, and read by every backbone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import (
    Config,
    ContentSettings,
    EmbeddingSettings,
    TableSettings,
    ranking_settings,
)
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.data.vocabularies import BoundedVocabularies
from recsys.model.build import build_em3
from recsys.model.em3 import EM3
from recsys.model.tables import id_dropouts, pooled_features, table_configs
from recsys.ranking import RANKING_MODELS
from recsys.ranking.vectors import IDVectors
from recsys.storage.location import Location
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import STEPS, Run, em3_config, full_table, train_configs
from tests.recsys.ranking.backbone_runs import backbone_config
from tests.several_histories import write_several_histories

ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_several_histories(tmp_path_factory.mktemp("several") / "data")


def config_of(name: str, **ranking: Any) -> Config:
    embedding = EmbeddingSettings(dim=8, init_std=0.5)
    settings = ranking_settings(name, mlp_units=[8], dropout=0.0, **ranking)
    return Config(content="none", embedding=embedding, ranking=settings)


def unsharded(data: Path, config: Config) -> tuple[EM3, Batch]:
    """The model with its tables, and a batch with rows of the bounded table."""
    root = Location.of(data)
    schema = load_schema(root)
    torch.manual_seed(0)
    em3 = build_em3(config, schema, table_configs(config, schema), {}, None, "cpu")
    pooled = pooled_features(config.embedding, schema)
    batch = BatchBuilder(schema, pooled)(
        next(ParquetRows.of_split(root, "train", schema).read(0, ROWS))
    )
    BoundedVocabularies(schema, pooled).map_batch(batch, 0, training=True)
    return em3, batch


def encoded(em3: EM3, batch: Batch) -> IDVectors:
    """The vectors that the ranking model gets."""
    vectors: list[IDVectors] = []
    handle = em3.ranking.register_forward_pre_hook(lambda _, inputs: vectors.append(inputs[0]))
    em3(batch)
    handle.remove()
    return vectors[0]


def weight(em3: EM3, table: str) -> Tensor:
    holder = em3.embeddings.embeddings[table]
    assert isinstance(holder.weight, Tensor)
    return holder.weight


def test_an_event_has_the_vector_of_its_item_plus_those_beside_it(data: Path) -> None:
    em3, batch = unsharded(data, config_of("din"))
    features, ids = batch.sequence_features, encoded(em3, batch)

    def shops(name: str) -> Tensor:
        return weight(em3, "history_shop")[features[name].values()].view(-1, 2, 8).sum(dim=1)

    items = weight(em3, "item")
    history = items[batch.history.items[batch.history.index]] + shops("history_shop")
    bought = items[features["bought"].values()] + shops("bought_shop")
    searched = weight(em3, "searched")[features["searched"].values()]
    assert len(bought) > ROWS / 2 and len(searched) > ROWS / 2
    assert not ids.history_is_unique
    torch.testing.assert_close([ids.history, *ids.further], [history, bought, searched])
    torch.testing.assert_close(ids.target, items[batch.target.items])


def test_a_further_history_is_encoded_as_plain_attention_encodes_it(data: Path) -> None:
    em3, batch = unsharded(data, config_of("dlrm"))
    ids, extra = encoded(em3, batch), em3.further_histories
    assert extra is not None
    encoder, history = extra.encoders[0], batch.history.extras[0]
    start = 0
    for row, length in enumerate(history.lengths.tolist()):
        row_slice = slice(start, start + length)
        start += length
        lists = history.values[row_slice] @ encoder.parallel_map.weight.T  # type: ignore[union-attr]
        events = ids.further[0][row_slice] + lists
        target = ids.target[row].expand_as(events)
        inputs = torch.cat([events, target, events - target, events * target], dim=1)
        weights = encoder.score(inputs).softmax(dim=0)  # type: ignore[operator]
        expected = (weights * events).sum(dim=0)
        torch.testing.assert_close(ids.pooled[-2][row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(RANKING_MODELS))
def test_every_backbone_reads_the_further_histories(data: Path, name: str) -> None:
    em3, batch = unsharded(data, config_of(name))
    loss, (_, logits, _) = em3(batch)
    loss.backward()
    assert torch.isfinite(logits).all()
    assert em3.further_histories is not None
    for key, parameter in em3.further_histories.named_parameters():
        if not key.endswith("score.4.bias"):  # cancelled by the softmax
            assert parameter.grad is not None and parameter.grad.any(), key
    for table in ("item", "history_shop", "searched"):
        gradient = weight(em3, table).grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), table


def test_a_mean_does_not_depend_on_the_target(data: Path) -> None:
    em3, batch = unsharded(data, config_of("two_tower"))
    ids = encoded(em3, batch)
    other = replace(ids, target=ids.target.flip(0), pooled=ids.pooled[:-2])
    assert em3.further_histories is not None
    torch.testing.assert_close(em3.further_histories(other, None, batch).pooled, ids.pooled)


def steps_of(rank: int, world_size: int, folder: Path) -> Run:
    """Some steps of the small EM3, which reads the content of a further history."""
    settings: dict[str, Any] = {"attention_units": [8], "mlp_units": [8], "dropout": 0.0}
    ranking = ranking_settings("mmoe", num_experts=2, **settings)
    config = em3_config(folder, ranking=ranking)
    assert isinstance(config.content, ContentSettings)
    history = replace(config.content.history, columns=["bought"])
    config = replace(config, content=replace(config.content, history=history))
    return train_configs(rank, world_size, folder, {"mmoe": config})["mmoe"]


def test_two_ranks_train_as_one(data: Path) -> None:
    pair = run_on_ranks(steps_of, 2, data.parent)
    (single,) = run_on_ranks(steps_of, 1, data.parent)
    for step in range(STEPS):
        torch.testing.assert_close(
            torch.cat([run.logits[step] for run in pair]), single.logits[step]
        )
        expected = {
            name: gradient
            for name, gradient in single.gradients[step].items()
            if name.startswith(("further_histories.", "ranking."))
        }
        gradients = {name: pair[0].gradients[step][name] for name in expected}
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    assert any(name.startswith("further_histories.content_encoders.") for name in expected)
    for table in ("item", "searched", "history_shop", "user"):
        tables = full_table(pair, STEPS, table), full_table([single], STEPS, table)
        torch.testing.assert_close(*tables, atol=1e-5, rtol=1e-4)


def test_items_of_further_histories_are_among_those_whose_content_is_read(data: Path) -> None:
    root = Location.of(data)
    schema = load_schema(root)
    rows = next(ParquetRows.of_split(root, "train", schema).read(0, ROWS))
    batch = BatchBuilder(schema, [], content_histories=["bought"])(rows)
    alone = BatchBuilder(schema, [])(rows)
    bought = batch.sequence_features["bought"].values()
    assert batch.history.items[batch.history.extras[0].index].equal(bought)
    assert len(batch.history.items) > len(alone.history.items)
    for built in (batch, alone):
        viewed = [item for items in rows["history"].to_pylist() for item in items or ()]
        assert built.history.items[built.history.index].tolist() == viewed
    assert not len(batch.history.extras[1].index)


def test_settings_that_would_be_left_out_are_refused(data: Path) -> None:
    schema, config = load_schema(Location.of(data)), config_of("din")
    with pytest.raises(ValueError, match=r"embedding.skip.*'bought_shop'"):
        skip = replace(config.embedding, skip=["bought_shop"])
        table_configs(replace(config, embedding=skip), schema)
    with pytest.raises(ValueError, match=r"searched.id_dropout"):
        tables = {"searched": TableSettings(id_dropout=0.5)}
        id_dropouts(replace(config.embedding, tables=tables), schema)
    with pytest.raises(ValueError, match=r"content.history.top_k.*history_shop"):
        content = backbone_config(data.parent, "din", "concat")
        assert not isinstance(content.content, str)
        history = replace(content.content.history, top_k=2)
        searching = replace(content, content=replace(content.content, history=history))
        build_em3(searching, schema, table_configs(config, schema), {}, None, "cpu")
    with pytest.raises(ValueError, match=r"content.history.columns: 'searched'"):
        history = replace(content.content.history, columns=["searched"])
        reading = replace(content, content=replace(content.content, history=history))
        build_em3(reading, schema, table_configs(config, schema), {}, None, "cpu")
