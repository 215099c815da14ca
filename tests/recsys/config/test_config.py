"""Recipes and overrides become one checked tree, or an error that names the setting."""

from pathlib import Path

import pytest
import yaml

from recsys.config import Config, ContentSettings, load_config, save_config

RECIPES = sorted((Path(__file__).parents[3] / "recsys" / "recipes").glob("*.yaml"))
TINY = next(path for path in RECIPES if path.name == "tiny.yaml")


def content_of(config: Config) -> ContentSettings:
    assert isinstance(config.content, ContentSettings)
    return config.content


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_bundled_recipe_is_valid_and_survives_saving(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_content_none_gives_the_id_only_twin_of_every_recipe(recipe: Path, tmp_path: Path) -> None:
    config, baseline = load_config(recipe), load_config(recipe, ["--content", "none"])
    assert baseline.content == "none"
    assert (baseline.embedding, baseline.ranking, baseline.optimizer) == (
        config.embedding,
        config.ranking,
        config.optimizer,
    )
    save_config(baseline, tmp_path / "twin.yaml")
    assert load_config(tmp_path / "twin.yaml") == baseline


def test_the_command_line_overrides_the_recipe_and_leaves_the_rest() -> None:
    config = load_config(
        TINY,
        [
            *("--epochs", "7", "--content.dim", "8"),
            "--content.modalities.text.lora.rank=3",
            "--embedding.skip=[user,genres]",
            "--embedding.tables.item.learning_rate=0.5",
        ],
    )
    assert (config.epochs, config.batch_size) == (7, 256)
    assert (content_of(config).dim, content_of(config).fusion.num_heads) == (8, 2)
    assert content_of(config).modalities["text"].lora.rank == 3
    assert content_of(config).modalities["text"].encoder == "random:bert"
    assert config.embedding.skip == ["user", "genres"]
    assert config.embedding.tables["item"].learning_rate == 0.5


def test_null_on_the_command_line_leaves_out_a_modality_of_the_recipe() -> None:
    argv = ["--content.modalities.tags.column", "genres", "--content.modalities.title.revision"]
    argv += ["null", "--content.modalities.description"]  # a revision is no modality
    for null in (["null"], ["null", "--epochs", "3"]):
        config = load_config("implicit_content", [*argv, *null])
        assert {name: m.column for name, m in content_of(config).modalities.items()} == {
            "title": "title",
            "tags": "genres",
            "terms": "tags",
        }
    assert config.epochs == 3 and content_of(config).modalities["title"].revision is None
    message = "content.modalities.tagz is null, but the recipe has no such modality; did you mean"
    with pytest.raises(ValueError, match=message):
        load_config("implicit_content", ["--content.modalities.tagz=null"])


def test_the_recipe_of_ifdb_is_the_general_one_with_three_more_bags_of_terms() -> None:
    bags = ["author", "genre", "system"]
    argv = [text for name in bags for text in (f"--content.modalities.{name}", "null")]
    assert load_config("ifdb", argv) == load_config("implicit_content")


def test_installed_recipes_are_found_from_any_folder_by_the_name_on_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "recsys/recipes/id_only.yaml"
    expected = load_config(name)
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == expected
    run_folder = tmp_path / name
    run_folder.parent.mkdir(parents=True)
    run_folder.write_text("epochs: 77\n")
    assert load_config(name).epochs == 77


@pytest.mark.parametrize(
    ("text", "text_of_error"),
    [
        ("epoch: 3", "epoch"),
        ("content: {modalities: {}, fusion: {heads: 2}}", "heads"),
        ("embedding: {sharding: diagonal}", "diagonal"),
        ("content: all", "content"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named_with_the_file(
    tmp_path: Path, text: str, text_of_error: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=text_of_error) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"config {path}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed=-1", "seed is -1"),
        (f"--seed={2**64}", f"seed is {2**64}"),
        ("--embedding.tables={user: {id_dropout: 1}}", "embedding.tables.user.id_dropout is 1.0"),
        ("--optimizer.learning_rate=-1", "optimizer.learning_rate is -1.0"),
        ("--optimizer.ema_tables=true", "ema_decay"),
        ("--ranking.mlp_units=[8,0]", r"ranking.mlp_units\[1\] is 0.*> 0"),
        (
            "--ranking={name: dlrm, ensemble_members: 2}",
            r"ranking.ensemble_members .*'dlrm'.*\['name', .*dense_units",
        ),
        (
            "--ranking={name: two_tower, temperature: 0}",
            "ranking.temperature is 0.0.*> 0",
        ),
        ("--content.history={top_k: 2, columns: [bought]}", r"top_k is 2.*columns.*'bought'"),
        ("--content.history={top_k: 2, recent: [5]}", r"top_k is 2.*recent \[5\]"),
        ("--ranking.loss=in_batch_softmax", "ranking.loss .* 'din_dcn'"),
        ("--contrastive.weight=-1", "contrastive.weight is -1.0"),
        ("--content.fusion.dropout=-0.1", "content.fusion.dropout is -0.1"),
        ("--content.modalities.text.lora.rank=0", "content.modalities.text.lora.rank is 0"),
        (
            "--content.modalities.text.max_length=0",
            "content.modalities.text.max_length is 0.*> 0",
        ),
    ],
)
def test_values_that_cannot_work_are_named(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(TINY, [options])


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ({"kind": "text"}, "`encoder`"),
        ({"kind": "image"}, "`encoder` and `module`"),
        ({"kind": "image", "module": "b:c", "training": "lora"}, "lora needs .*`encoder`"),
        ({"kind": "image", "module": "b:c", "revision": "a"}, "revision is of `encoder`"),
        ({"kind": "feature", "encoder": "a"}, "feature .*encoder"),
        ({"kind": "feature", "training": "full"}, "`training: frozen`"),
    ],
)
def test_a_modality_whose_parts_exclude_each_other_is_named(
    tmp_path: Path, modality: dict[str, str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    content = {"modalities": {"poster": {"column": "poster", **modality}}}
    path.write_text(yaml.safe_dump({"content": content}))
    with pytest.raises(ValueError, match=rf"content.modalities.poster: .*{message}"):
        load_config(path)


def test_tables_are_averaged_only_where_their_rows_are_in_one_place() -> None:
    argv = ["--optimizer.ema_decay=0.9", "--optimizer.ema_tables=true"]
    assert load_config(TINY, argv).optimizer.ema_tables
    with pytest.raises(ValueError, match=r"ema_tables.*item.kernel is uvm_caching"):
        load_config(TINY, [*argv, "--embedding.tables={item: {kernel: uvm_caching}}"])
    for half in ("precision=fp16", "tables={item: {precision: fp16}}"):
        with pytest.raises(ValueError, match=r"ema_tables.*embedding.precision to fp32"):
            load_config(TINY, [*argv, f"--embedding.{half}"])


def test_a_metric_is_not_named_as_one_of_the_search_that_chooses_the_model() -> None:
    argv = ["--ranking={name: two_tower, depths: [10]}", "--best_model_by=ndcg"]
    for name in ("ndcg@10", "ndcg_at_10"):
        metrics = f"--metrics={{{name}: {{metric: precision_at_k}}}}"
        with pytest.raises(ValueError, match=rf"metrics\.{name}: .* has 'ndcg@10' already"):
            load_config(TINY, [*argv, metrics])
        assert name in load_config(TINY, [metrics]).metrics  # without a search


def test_all_items_are_on_each_rank_already() -> None:
    argv = ["--ranking.name=two_tower", "--ranking.loss=full_softmax"]
    assert load_config(TINY, argv).ranking.loss == "full_softmax"
    with pytest.raises(ValueError, match=r"ranking.all_ranks: full_softmax has all items"):
        load_config(TINY, [*argv, "--ranking.all_ranks=true"])


def test_neighbours_need_the_modalities_that_similarities_keep() -> None:
    argv = ["--neighbours={dim: 4}", "--content.history.similarity_features=false"]
    assert load_config(TINY, [*argv, "--content=none"]).neighbours is not None
    with pytest.raises(ValueError, match=r"neighbours compare .*similarity_features false"):
        load_config(TINY, argv)
