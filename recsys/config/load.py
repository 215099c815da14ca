"""Read, check and write the configuration of a run: YAML and the command line.

Every field of `Config` is a setting of recipes, and an option `--any.setting VALUE`.
"""

import itertools
import logging
import math
import os
import re
import warnings
from collections.abc import Container, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings

from recsys.config.limits import check_settings
from recsys.config.parser import Parser, config_first, meant, option_groups, with_underscores
from recsys.config.plain_yaml import RECIPES, RefusedYaml, cached_copy, load_plain_yaml, recipe_file
from recsys.config.ranking import (
    DEFAULT_MODEL,
    RankingSettings,
    RetrievalSettings,
    check_keys,
    for_model,
    settings_class,
)
from recsys.config.run import CONFIG_NAMES, Config, content_settings

logger = logging.getLogger(__name__)

SEARCH_METRICS = ("recall", "ndcg", "mrr")  # measured at each of `ranking.depths`


def validate(config: Config) -> None:
    """Raise a ValueError for a setting out of range, or for settings that exclude each other."""
    check_settings(config)
    _check_search(config.best_model_by, config.ranking)
    _check_metric_names(config)
    if config.optimizer.ema_tables:
        _check_averages(config)
    if config.neighbours is not None and isinstance(config.ranking, RetrievalSettings):
        raise ValueError(
            "neighbours are blended with logits, and a retrieval model ranks by vectors alone; set "
            "neighbours to null"
        )
    content, temperature = content_settings(config.content), config.contrastive.temperature
    if content and config.neighbours is not None and not content.history.similarity_features:
        raise ValueError(
            "neighbours compare the modalities of items, which content.history.similarity_features "
            "false leaves out; set it to true, or neighbours to null"
        )
    if content and config.contrastive.weight > 0 and not 0 < temperature < math.inf:
        raise ValueError(f"contrastive.temperature is {temperature}; it must be > 0 and finite")


def _check_search(best_model_by: str, ranking: RankingSettings) -> None:
    """Raise if the best model is chosen by retrieval metrics that no validation computes."""
    if best_model_by not in ("recall", "ndcg"):
        return
    if not isinstance(ranking, RetrievalSettings):
        raise ValueError(
            f"best_model_by {best_model_by} needs a retrieval model, and ranking.name is "
            f"{ranking.name}; choose two_tower, or best_model_by auc, gauc, auc_and_gauc or "
            "all_and_unseen"
        )
    if 10 not in ranking.depths:
        raise ValueError(
            f"best_model_by {best_model_by} is that of lists of 10 items; add 10 to "
            f"ranking.depths {ranking.depths}"
        )


def _check_metric_names(config: Config) -> None:
    """Raise for a further metric with the name of a retrieval metric, which it would replace."""
    if not isinstance(config.ranking, RetrievalSettings):
        return
    for name in config.metrics:
        kind, _, depth = name.replace("_at_", "@").partition("@")  # trackers write _at_
        if kind in SEARCH_METRICS and depth in map(str, config.ranking.depths):
            raise ValueError(
                f"metrics.{name}: a search of all items has '{kind}@{depth}' already, which could "
                "not be told from it; choose another name"
            )


def _check_averages(config: Config) -> None:
    """Raise for table averages without a decay, of fp16 rows, or of rows in caches or copies."""
    if config.optimizer.ema_decay is None:
        raise ValueError(
            "optimizer.ema_tables is true, but optimizer.ema_decay is not set; give a decay, such "
            "as 0.98"
        )
    table_settings, copies = config.embedding.tables, config.embedding.parallel.copies
    precisions = [table.precision for table in table_settings.values()]
    if "fp16" in (config.embedding.precision, *precisions):
        raise ValueError(
            "optimizer.ema_tables averages tables in their own type, and fp16 would round small "
            "changes to nothing; set embedding.precision to fp32, or ema_tables to false"
        )
    cached = [name for name, table in table_settings.items() if table.kernel == "uvm_caching"]
    if cached or copies > 1:
        problem = f"embedding.parallel.copies is {copies}"
        if cached:
            problem = f"embedding.tables.{cached[0]}.kernel is uvm_caching"
        raise ValueError(
            f"optimizer.ema_tables reads tables in place in each step, but {problem}; set "
            "ema_tables to false"
        )


def add_config_arguments(
    parser: Parser, argv: Sequence[str], skip: frozenset[str] = frozenset()
) -> None:
    """Add `--config FILE` and every setting of `Config` except `skip` as `--name.of.setting`.

    The command line `argv` chooses the ranking model, and thereby its settings. An unknown model,
    or a key under `ranking` that the model lacks, is a ValueError.
    """
    # Only the help text needs docstrings of settings, which are parsed from source files.
    shows_help = not {"-h", "--help"}.isdisjoint(argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=shows_help)
    hints = get_type_hints(Config, include_extras=True)
    groups = config_first(option_groups(argv))
    options = [_option(group) for group in groups if group[0].startswith("--")]
    recipes = {value: _read_recipe(value) for option, value in options if option == "--config"}
    parser.removed = _remove_modalities(options, recipes)
    mappings = [
        (option, _as_mapping(option, value, hints, recipes))
        for option, value in options
        if option.removeprefix("--") not in parser.removed
    ]
    name = _ranking_name(mappings)
    action = _recipe_action(name, recipes)
    parser.add_argument("--config", action=action, help="A recipe (YAML).")
    parser.add_class_arguments(Config, None, skip={"ranking", *skip})
    parser.add_class_arguments(settings_class(name), "ranking")
    parser.set_defaults({"ranking.name": name})
    parser.settings = hints | {"ranking": settings_class(name)}
    parser.values = [for_model(mapping, name) for _, mapping in mappings]


def config_from(namespace: Namespace) -> Config:
    """Return the checked `Config` in parsed command-line arguments."""
    config = Config(**{name: namespace[name] for name in CONFIG_NAMES if name in namespace})
    validate(config)
    return config


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe; `overrides` are command-line arguments such as `["--epochs", "1"]`.

    A missing file, an unknown key or a wrong type is a ValueError that names it.
    """
    if not recipe_file(path).is_file():
        raise ValueError(f"config {path}: no such file; correct the path of the recipe")
    argv = with_underscores(["--config", str(path), *overrides])
    try:
        parser = Parser(exit_on_error=False, prog="the configuration")
        add_config_arguments(parser, argv)
        namespace = parser.instantiate(parser.parse_args(argv))
    except Exception as error:
        prefix = f"config {path}: "
        raise ValueError(f"{prefix}{str(error).removeprefix(prefix)}") from error
    return config_from(namespace)


@cached_copy
def config_of_plain(plain: dict[str, Any]) -> Config:
    """Return the `Config` of a `to_plain` result, with defaults; raise for a wrong setting."""
    name = _ranking_name([("--config", plain)])
    parser = Parser(exit_on_error=False)
    add_config_arguments(parser, ["--ranking.name", name])
    plain = for_model(without_removed_settings(plain), name)
    parser.values.append(plain)
    try:
        return config_from(parser.instantiate(parser.parse_object(plain)))
    except Exception as error:
        raise ValueError(f"configuration: {error}") from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, readable by `load_config`."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))


def to_plain(value: Any) -> Any:
    """Return settings as dictionaries, lists, text and numbers."""
    if is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _remove_modalities(
    options: Sequence[tuple[str, str]], recipes: dict[str, Any]
) -> frozenset[str]:
    """Remove modalities that options set to null from the recipes; return the options' names."""
    prefix = "content.modalities."
    settings = [option.removeprefix("--") for option, value in options if value == "null"]
    removed = frozenset(name for name in settings if re.fullmatch(rf"{prefix}[^.]+", name))
    modalities: list[dict[str, Any]] = []
    for recipe in recipes.values():
        match recipe:
            case {"content": {"modalities": {} as recipe_modalities}}:
                modalities.append(recipe_modalities)
    for name in (setting.removeprefix(prefix) for setting in sorted(removed)):
        if not any(name in recipe_modalities for recipe_modalities in modalities):
            suggestion = meant(name, itertools.chain(*modalities))
            raise ValueError(
                f"{prefix}{name} is null, but the recipe has no such modality{suggestion}"
            )
        for recipe_modalities in modalities:
            recipe_modalities.pop(name, None)
    return removed


def _recipe_action(name: str, recipes: dict[str, Any]) -> type[ActionConfigFile]:
    class Recipe(ActionConfigFile):
        """Reads a recipe as plain data, and keeps only the model's keys under `ranking`."""

        def __call__(
            self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
        ) -> None:
            """Apply the recipe to the configuration that is being parsed."""
            recipe = for_model(recipes[values], name, warn=True)
            if not isinstance(recipe, dict):
                raise TypeError(
                    f"config {values}: no such file, nor a mapping of settings; correct the path, "
                    f"or name one of {sorted(file.stem for file in RECIPES.glob('*.yaml'))}"
                )
            self.apply_config(parser, cfg, self.dest, yaml.safe_dump(recipe, sort_keys=False))

    return Recipe


def _read_recipe(recipe: str) -> Any:
    try:
        file = recipe_file(recipe)
        content = load_plain_yaml(file.read_bytes() if os.path.isfile(file) else recipe.encode())
        if not isinstance(content, dict):
            return content
        if "config" in content:  # jsonargparse would read the named file
            raise RefusedYaml("config is no setting; give several --config")
        return without_removed_settings(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {recipe}: {error}") from error


def _ranking_name(mappings: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the last ranking model named in options or recipes; check keys that options set."""
    name, keys = DEFAULT_MODEL, list[str]()
    for option, mapping in mappings:
        section = mapping.get("ranking")
        if option == "--ranking":
            section = _read_recipe(str(section))
        if isinstance(section, dict):
            name = str(section.get("name", name))
            keys += [] if option == "--config" else section
    check_keys(keys, name)
    return name


def _as_mapping(
    option: str, value: str, settings: Container[str], recipes: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings that an option sets, as a mapping; empty if it sets none."""
    name = option.removeprefix("--")
    if name == "config":
        recipe = recipes[value]
        return recipe if isinstance(recipe, dict) else {}
    first, *inner = name.split(".")
    mapping: Any = value
    for key in reversed(inner):
        mapping = {key: mapping}
    return {first: mapping} if first in settings else {}


def _option(group: Sequence[str]) -> tuple[str, str]:
    option, equals, value = group[0].partition("=")
    return option, value if equals else [*group, "true"][1]


def without_removed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without settings that only earlier releases had.

    A FutureWarning names each removed setting that was in use, and what applies instead.
    """
    neighbours, embedding = recipe.get("neighbours"), recipe.get("embedding")
    if isinstance(neighbours, dict) and "decay" in neighbours:
        if neighbours["decay"] is not None:
            _warn("neighbours.decay", "has no effect: events of any age count the same; remove it")
        remaining = {key: value for key, value in neighbours.items() if key != "decay"}
        recipe = recipe | {"neighbours": remaining}
    tables = embedding.get("tables") if isinstance(embedding, dict) else None
    if not isinstance(embedding, dict) or not isinstance(tables, dict):
        return recipe
    for name, table in tables.items():
        if isinstance(table, dict) and table.get("new_rows") == "content":
            setting = f"embedding.tables.{name}.new_rows"
            _warn(setting, "content is no value: mean applies; set mean")
            tables = tables | {name: table | {"new_rows": "mean"}}
    return recipe | {"embedding": embedding | {"tables": tables}}


def _warn(setting: str, text: str) -> None:
    warnings.warn(f"{setting}: {text}", FutureWarning, stacklevel=3)
