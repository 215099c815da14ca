"""Every ranking backbone: rows are independent, all weights train, and twins are TorchRec's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import ContentSettings, RankingSettings, ranking_settings
from recsys.config.ranking import keys_of
from recsys.content.vectors import ContentVectors
from recsys.data.schema import parse_schema
from recsys.kernels.choice import _KernelChoice
from recsys.model.build import build_ranking
from recsys.ranking import RANKING_MODELS
from recsys.ranking.attention_models import Mmoe
from recsys.ranking.layers.fields import history_numbers
from recsys.ranking.vectors import CodeLogits, IDVectors, InputDimensions, TowerVectors
from tests.fake_gpu import fake_gpu, on_fake_gpu
from tests.recsys.ranking.ranking_inputs import (
    CONTENT,
    DIMENSIONS,
    ID_DIM,
    LENGTHS,
    inputs,
    one_row,
)

SMALL: dict[str, Any] = {
    "attention_units": [5],
    "cross_layers": 2,
    "cross_rank": 3,
    "dense_units": [6],
    "mlp_units": [16, 8],
    "num_experts": 3,
    "search_top_k": 2,
    "sequence_dim": 8,
    "recent_items": 2,
}
BACKBONES = sorted(RANKING_MODELS)
by_backbone = pytest.mark.parametrize("name", BACKBONES)
by_content = pytest.mark.parametrize("content", [CONTENT, None], ids=["content", "id_only"])


def settings_of(name: str, **settings: Any) -> RankingSettings:
    """Small settings, of those that the backbone has, and these."""
    keys = keys_of(name)
    small = {key: value for key, value in SMALL.items() if key in keys}
    return ranking_settings(name, **(small | settings))


def model_of(
    name: str,
    content: ContentSettings | None = CONTENT,
    dimensions: InputDimensions = DIMENSIONS,
    **settings: Any,
) -> nn.Module:
    torch.manual_seed(0)
    return build_ranking(settings_of(name, **settings), dimensions, content).eval()


def logits_of(model: nn.Module, *model_inputs: Any) -> Tensor:
    scored = model(*model_inputs)
    return scored.logits if isinstance(scored, TowerVectors | CodeLogits) else scored


@by_content
@by_backbone
def test_a_row_s_logits_do_not_depend_on_the_other_rows(
    name: str, content: ContentSettings | None
) -> None:
    model, model_inputs = model_of(name, content), inputs()
    together = logits_of(model, *model_inputs)
    assert together.shape == (3, 1) and len(set(together.flatten().tolist())) == 3
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(logits_of(model, *one_row(model_inputs, row))[0], together[row])


@by_backbone
def test_logits_depend_on_content_where_there_is_some_and_only_there(name: str) -> None:
    (ids, content, batch), (_, other, _) = inputs(), inputs(seed=1)
    model, plain = model_of(name), model_of(name, None)
    assert not torch.allclose(
        logits_of(model, ids, content, batch), logits_of(model, ids, other, batch)
    )
    assert torch.equal(logits_of(plain, ids, content, batch), logits_of(plain, ids, None, batch))


@by_content
@by_backbone
def test_every_parameter_gets_gradient(name: str, content: ContentSettings | None) -> None:
    model = model_of(name, content)
    weights = torch.tensor([[1.0], [-2.0], [0.5]])
    (logits_of(model, *inputs()) * weights).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        # The last score's bias shifts all of a softmax and so has none.
        if parameter_name != "interest.score.2.bias":
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 1e-7, parameter_name


@by_content
@by_backbone
def test_a_batch_without_events_trains(name: str, content: ContentSettings | None) -> None:
    model, model_inputs = model_of(name, content), inputs(torch.tensor([0, 0]))
    logits_of(model, *model_inputs).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0


ROWS, NUM_FEATURES = 4, 3
Baseline = Callable[[EmbeddingBagCollection, int], nn.Module]
BASELINES: dict[str, Baseline] = {
    "dlrm": lambda bags, dense: DLRM(bags, dense, [6, ID_DIM], [16, 8, 1]),
    "dlrm_dcn": lambda bags, dense: DLRM_DCN(bags, dense, [6, ID_DIM], [16, 8, 1], 2, 3),
    "deepfm": lambda bags, dense: SimpleDeepFMNN(dense, bags, 6, 7),
}


def bags_of(features: list[str]) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=ID_DIM, num_embeddings=10, feature_names=[name])
        for name in features
    ]
    return EmbeddingBagCollection(tables=tables)


def copied_weights(name: str, baseline: nn.Module, model: nn.Module) -> None:
    """Gives TorchRec's model the weights of ours: by their names, which are TorchRec's but for
    DeepFM's."""
    renamed = {
        "deep.dense_module.0.": "inter_arch.deep_fm.dense_module.0.",
        "top.": "over_arch.model.0.",
    }
    state = baseline.state_dict()
    for key, value in model.state_dict().items():
        for name_here, torchrec in renamed.items() if name == "deepfm" else ():
            key = key.replace(name_here, torchrec)
        assert state[key].shape == value.shape, key
        state[key] = value
    baseline.load_state_dict(state)


@pytest.mark.parametrize("name", BASELINES)
def test_the_id_only_twin_equals_torchrec_s_model(name: str) -> None:
    """Without a history, the target is one more feature of TorchRec's model."""
    torch.manual_seed(1)
    features = ["user", "genres", "item"]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        features, torch.randint(10, (ROWS * NUM_FEATURES,)), torch.ones(ROWS * NUM_FEATURES).int()
    )
    baseline = BASELINES[name](bags_of(features), 2).eval()
    units = [7] if name == "deepfm" else [16, 8]
    dimensions = InputDimensions([ID_DIM, ID_DIM], ID_DIM, 2, 0, 1, has_history=False)
    model = model_of(name, None, dimensions, mlp_units=units)
    copied_weights(name, baseline, model)
    *_, batch = inputs(torch.zeros(ROWS, dtype=torch.long))
    batch = replace(batch, history=replace(batch.history, values=torch.zeros(0, 0)))
    by_name = baseline.sparse_arch.embedding_bag_collection(sparse).to_dict()  # type: ignore
    ids = IDVectors([by_name["user"], by_name["genres"]], by_name["item"], torch.zeros(0, ID_DIM))
    logits, expected = model(ids, None, batch), baseline(batch.dense_features, sparse)
    if name == "deepfm":  # which ends with probabilities
        logits = logits.sigmoid()
    assert len(set(expected.flatten().tolist())) == ROWS
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["dlrm", "dlrm_dcn"])
def test_the_history_of_the_twin_is_a_mean_pooled_feature(name: str) -> None:
    torch.manual_seed(1)
    ids, _, batch = inputs()
    dimensions = replace(DIMENSIONS, pooled_dims=[], pooled_names=())
    model = model_of(name, None, dimensions)
    history = list(ids.history.split(LENGTHS.tolist()))
    liked = [item * flags for item, flags in zip(history, batch.history.values.split([2, 0, 3]))]
    means, liked_means = (
        torch.stack([rows.sum(0) / max(len(rows), 1) for rows in lists])
        for lists in (history, liked)
    )
    numbers = history_numbers(batch.history.jagged(), batch.history.values)
    dense = model.dense_arch(torch.cat([batch.dense_features, numbers], dim=1))  # type: ignore
    sparse = torch.stack([ids.target, means, liked_means], dim=1)
    expected = model.over_arch(model.inter_arch(dense, sparse))  # type: ignore
    ids = replace(ids, pooled=[])
    torch.testing.assert_close(model(ids, None, batch), expected)


def test_logits_are_the_mlp_of_the_cross_network_of_all_vectors() -> None:
    model: Any = model_of("din_dcn")
    model_inputs = inputs()
    ids, content, batch = one_row(model_inputs, 2)
    assert model.content_interest is not None
    values, history = batch.history.values, batch.history.jagged()
    vectors = [
        batch.dense_features,
        *ids.pooled,
        ids.target,
        model.interest(ids.target, ids.history, history, values),
        history_numbers(history, values),
        content.target,
        model.content_interest(content, history, values),
    ]
    x0 = torch.cat(vectors, dim=1)
    x = x0
    for v, w, bias in zip(model.cross.V_kernels, model.cross.W_kernels, model.cross.bias):
        x = x0 * ((x @ v.T) @ w.T + bias) + x  # DCN-v2, low rank
    linears = [layer for layer in model.mlp if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        x = torch.relu(x @ layer.weight.T + layer.bias)
    expected = x @ linears[-1].weight.T + linears[-1].bias
    torch.testing.assert_close(model(ids, content, batch), expected, atol=1e-5, rtol=1e-5)


def test_the_experts_of_mmoe_are_mixed_by_each_label_s_gate() -> None:
    model = model_of("mmoe", None, replace(DIMENSIONS, num_labels=2))
    assert isinstance(model, Mmoe)
    features = torch.randn(4, model.feature_dim)
    experts = [
        torch.relu(features @ weight.T + bias)
        for weight, bias in zip(model.experts.weight.chunk(3), model.experts.bias.chunk(3))
    ]
    mixtures = model.mixtures(features)
    for label, gate_weight in enumerate(model.gates.weight.chunk(2)):
        gate = torch.softmax(features @ gate_weight.T, dim=1)
        expected = sum(gate[:, [index]] * expert for index, expert in enumerate(experts))
        torch.testing.assert_close(mixtures[:, label], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dlrm", "mlp_units": []}, "ranking.mlp_units is empty.* dlrm"),
        ({"name": "mmoe", "mlp_units": []}, "ranking.mlp_units is empty"),
        ({"name": "deepfm", "dense_units": [4, 4]}, r"dense_units \[4, 4\]; deepfm"),
        ({"name": "sim", "time_gaps": "age"}, r"ranking.time_gaps is 'age'.*\['liked'\]"),
        ({"name": "two_tower", "query_features": ["item"]}, "query_features: 'item' "),
        ({"name": "hstu", "sequence_heads": 3}, r"ranking.sequence_heads is 3.*sequence_dim \(8\)"),
        ({"name": "hstu", "time_gaps": "age"}, r"ranking.time_gaps is 'age'.*\['liked'\]"),
        (
            {"name": "no.such.module:Model"},
            "'no.such.module:Model' ",
        ),
        ({"name": "builtins:dict"}, "'builtins:dict' "),
    ],
)
def test_settings_that_a_backbone_cannot_use_are_named(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_ranking(settings_of(**settings), DIMENSIONS, None)


@pytest.mark.parametrize("name", ["two_tower", "generative"])
def test_the_history_of_a_user_tower_is_not_chosen_by_the_ranked_item(name: str) -> None:
    content = replace(CONTENT, history=replace(CONTENT.history, top_k=2))
    with pytest.raises(ValueError, match=rf"top_k is 2.*{name}.*set top_k to 0"):
        build_ranking(ranking_settings(name), DIMENSIONS, content)


@by_content
@by_backbone
def test_logits_of_a_batch_on_a_gpu_are_on_that_gpu(
    name: str, content: ContentSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_KernelChoice, "kernels", "torch")
    model, (ids, vectors, batch) = model_of(name, content), inputs()
    history = vectors.read_history()
    read = [vectors.target, history[0], vectors.target_modalities, history[1]]
    with fake_gpu():
        content_vectors = None if content is None else ContentVectors(*on_fake_gpu(read))
        on_fake_gpu(batch.sequence_features)
        logits = logits_of(
            on_fake_gpu(model), on_fake_gpu(ids), content_vectors, on_fake_gpu(batch)
        )
        assert logits.shape == (3, 1) and logits.device.type == "cuda"


def test_a_tensor_on_another_device_is_found() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        on_fake_gpu(torch.ones(3)) + torch.arange(3)


def test_columns_of_the_ranked_item_are_no_query_features() -> None:
    ids = {name: {"kind": "id", "num_embeddings": 9} for name in ("user", "item", "brand")}
    log_price = {"kind": "dense", "column": "price", "transform": ["log1p"]}
    pair = {"column": ["item", "hour"], "transform": ["cross"], "vocabulary": {"kind": "hash"}}
    columns = {**ids, "log_price": log_price, "hour": {"kind": "dense"}, "liked": {"kind": "label"}}
    columns["pair"] = ids["user"] | pair
    features = [{"by": ["item"], "columns": ["brand", "price"]}]
    content = {"target_item": "item", "group": "user", "columns": columns, "features": features}
    schema = parse_schema(content, "schema.yaml")
    dims = dict.fromkeys([*ids, "pair"], 4)
    dimensions = InputDimensions.from_schema(schema, ["user", "brand", "pair"], dims, None, {})
    assert dimensions.item_columns == ("brand", "pair", "log_price")
    build_ranking(ranking_settings("two_tower", query_features=["hour"]), dimensions, None)
    with pytest.raises(ValueError, match="query_features: 'log_price' is made of the ranked"):
        build_ranking(ranking_settings("two_tower", query_features=["log_price"]), dimensions, None)
    dimensions = replace(dimensions, group="brand")
    build_ranking(ranking_settings("din"), dimensions, None)
    with pytest.raises(ValueError, match=r"group 'brand' is made of .* two_tower reads it"):
        build_ranking(ranking_settings("two_tower"), dimensions, None)
