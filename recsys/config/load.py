"""Reads, checks and writes the configuration of a run: YAML and the command line.

Every field of `Config` is a setting of recipes, and an option `--any.setting VALUE`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings

from recsys.config.limits import check_settings
from recsys.config.parser import Parser, config_first, meant, with_underscores
from recsys.config.plain_yaml import RECIPES, RefusedYaml, cached_copy, load_plain_yaml, recipe_file
from recsys.config.ranking import (
    DEFAULT_MODEL,
    RankingSettings,
    RetrievalSettings,
    check_keys,
    own_keys,
    settings_class,
)
from recsys.config.removed_settings import without_removed_settings
from recsys.config.run import CONFIG_NAMES, Config, content_settings

logger = logging.getLogger(__name__)


def validate(config: Config) -> None:
    """Check every setting, then those that exclude each other; a ValueError names them."""
    check_settings(config)
    if config.best_model_by in ("recall", "ndcg"):
        _check_search(config.best_model_by, config.ranking)
    _check_averages(config)
    if config.neighbours is not None and isinstance(config.ranking, RetrievalSettings):
        raise ValueError(
            "neighbours are blended with logits, and a retrieval model ranks by vectors alone; set "
            "neighbours to null"
        )
    content, temperature = content_settings(config.content), config.contrastive.temperature
    if content is None:
        return
    if config.contrastive.weight > 0 and not 0 < temperature < math.inf:
        raise ValueError(f"contrastive.temperature is {temperature}; it must be > 0 and finite")


def _check_search(best_model_by: str, ranking: RankingSettings) -> None:
    """Refuse a choice of the best model by a search that is not made."""
    if not isinstance(ranking, RetrievalSettings):
        raise ValueError(
            f"best_model_by {best_model_by} needs a retrieval model, and ranking.name is "
            f"{ranking.name}; choose two_tower, or best_model_by auc, gauc or auc_and_gauc"
        )
    if 10 not in ranking.depths:
        raise ValueError(
            f"best_model_by {best_model_by} is that of lists of 10 items; add 10 to "
            f"ranking.depths {ranking.depths}"
        )


def _check_averages(config: Config) -> None:
    """Refuse averages of tables without a decay, or whose current rows are not in one place."""
    if not config.optimizer.ema_tables:
        return
    if config.optimizer.ema_decay is None:
        raise ValueError(
            "optimizer.ema_tables is true, but optimizer.ema_decay is not set; give a decay, such "
            "as 0.98"
        )
    table_settings, copies = config.embedding.tables, config.embedding.parallel.copies
    if "fp16" in (
        config.embedding.precision,
        *(part.precision for part in table_settings.values()),
    ):
        raise ValueError(
            "optimizer.ema_tables averages tables in their own type, and fp16 would round small "
            "changes to nothing; set embedding.precision to fp32, or ema_tables to false"
        )
    cached = [name for name, settings in table_settings.items() if settings.kernel == "uvm_caching"]
    if cached or copies > 1:
        what = f"embedding.tables.{cached[0]}.kernel is uvm_caching" if cached else ""
        raise ValueError(
            "optimizer.ema_tables reads tables in place in each step, but "
            f"{what or f'embedding.parallel.copies is {copies}'}; set ema_tables to false"
        )


ReadRecipe = Callable[[str], Any]


def add_config_arguments(
    parser: Parser, words: Sequence[str], skip: frozenset[str] = frozenset()
) -> None:
    """Add `--config FILE` and every setting of `Config` but `skip` as `--name.of.setting`.

    The command line `words` chooses the ranking model, and so its settings; an unknown model, or
    one without such a key under `ranking`, is a ValueError.
    """
    # Docstrings of settings are parsed from source files, and only a help text shows them.
    shows_help = not {"-h", "--help"}.isdisjoint(words)
    set_parsing_settings(docstring_parse_attribute_docstrings=shows_help)
    words = config_first(words)
    read = functools.cache(_read_recipe)
    name = _ranking_name(words, read)
    parser.removed = _removed_modalities(words, read)
    action = _recipe_action(name, read, parser.removed)
    parser.add_argument("--config", action=action, help="A recipe (YAML).")
    parser.add_class_arguments(Config, None, skip={"ranking", *skip})
    parser.add_class_arguments(settings_class(name), "ranking")
    parser.set_defaults({"ranking.name": name})
    parser.settings = get_type_hints(Config, include_extras=True)
    parser.settings["ranking"] = settings_class(name)
    parser.values = [
        _for_model(_as_mapping(option, value, parser.settings, read), name)
        for option, value in _options(words)
        if option.removeprefix("--") not in parser.removed
    ]


def config_from(namespace: Namespace) -> Config:
    """Return the checked `Config` in parsed command-line arguments."""
    config = Config(**{name: namespace[name] for name in CONFIG_NAMES if name in namespace})
    validate(config)
    return config


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe; `overrides` are command-line words such as `["--epochs", "1"]`.

    A missing file, an unknown key or a wrong type is a ValueError that names it.
    """
    if not recipe_file(path).is_file():
        raise ValueError(f"config {path}: no such file; correct the path of the recipe")
    words = with_underscores(["--config", str(path), *overrides])
    try:
        parser = Parser(exit_on_error=False, prog="the configuration")
        add_config_arguments(parser, words)
        namespace = parser.instantiate(parser.parse_args(words))
    except Exception as error:
        place = f"config {path}: "
        raise ValueError(f"{place}{str(error).removeprefix(place)}") from error
    return config_from(namespace)


@cached_copy
def config_of_plain(plain: dict[str, Any]) -> Config:
    """Invert `to_plain`, with defaults for missing settings; a wrong one is a ValueError."""
    section = plain.get("ranking")
    name = section.get("name", DEFAULT_MODEL) if isinstance(section, dict) else DEFAULT_MODEL
    parser = Parser(exit_on_error=False)
    add_config_arguments(parser, ["--ranking.name", str(name)])
    plain = _for_model(without_removed_settings(plain), name)
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


def _removed_modalities(words: Sequence[str], read: ReadRecipe) -> frozenset[str]:
    """Return the settings `content.modalities.NAME` that options set to null; a recipe has them."""
    prefix = "--content.modalities."
    removed = {option for option, value in _options(words) if value == "null"}
    names = {option.removeprefix(prefix) for option in removed if option.startswith(prefix)}
    recipes = [read(value) for option, value in _options(words) if option == "--config"]
    known = {name for recipe in recipes for name in _modalities(recipe)}
    for name in sorted(names - known):
        raise ValueError(
            f"content.modalities.{name} is null, but the recipe has no such modality"
            f"{meant(name, known)}"
        )
    return frozenset(f"content.modalities.{name}" for name in names)


def _modalities(recipe: Any) -> dict[str, Any]:
    content = recipe.get("content") if isinstance(recipe, dict) else None
    modalities = content.get("modalities") if isinstance(content, dict) else None
    return modalities if isinstance(modalities, dict) else {}


def _recipe_action(name: str, read: ReadRecipe, removed: frozenset[str]) -> type[ActionConfigFile]:
    """Return the action of `--config` for a ranking model of this name."""

    class Recipe(ActionConfigFile):
        """Reads a recipe as plain data, and keeps only the model's own keys under `ranking`."""

        def __call__(
            self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
        ) -> None:
            """Apply the recipe to the configuration that is being parsed."""
            recipe = _for_model(read(values), name)
            if removed and (modalities := _modalities(recipe)):
                remaining = {
                    key: settings
                    for key, settings in modalities.items()
                    if f"content.modalities.{key}" not in removed
                }
                recipe = {**recipe, "content": {**recipe["content"], "modalities": remaining}}
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
        if (
            isinstance(content, dict) and "config" in content
        ):  # the parser would read that file, too
            raise RefusedYaml("config is no setting; give several --config")
        return without_removed_settings(content) if isinstance(content, dict) else content
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {recipe}: {error}") from error


def _for_model(recipe: Any, name: str) -> Any:
    if not isinstance(recipe, dict):
        return recipe
    section = recipe.get("ranking")
    return recipe | {"ranking": own_keys(section, name)} if isinstance(section, dict) else recipe


def _ranking_name(words: Sequence[str], read: ReadRecipe) -> str:
    """Return the ranking model's name in a command line, the last one; check its other keys."""
    name, keys = DEFAULT_MODEL, list[str]()
    for option, value in _options(words):
        section: Any = None
        if option == "--config":
            recipe = read(value)
            section = recipe.get("ranking") if isinstance(recipe, dict) else None
        elif option == "--ranking":
            section = _read_recipe(value)
            keys += section if isinstance(section, dict) else []
        elif option.startswith("--ranking."):
            section = {option.removeprefix("--ranking."): value}
            keys += section
        if isinstance(section, dict):
            name = str(section.get("name", name))
    check_keys(keys, name)
    return name


def _as_mapping(
    option: str, value: str, settings: Container[str], read: ReadRecipe
) -> dict[str, Any]:
    """Return the settings that an option sets, as a mapping; empty for another option."""
    name = option.removeprefix("--")
    if name == "config":
        recipe = read(value)
        return recipe if isinstance(recipe, dict) else {}
    mapping: Any = value
    keys = name.split(".")
    if keys[0] not in settings:
        return {}
    for key in reversed(keys):
        mapping = {key: mapping}
    return mapping


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            yield option, value if equals else "true" if following.startswith("--") else following
