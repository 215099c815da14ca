"""The search space: settings with the values that trials may give them.

A YAML file maps settings by full name to ranges or choices::

    optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    content.fusion.num_queries: {low: 1, high: 8}
    ranking.dropout: {low: 0.0, high: 0.5, step: 0.1}
    ranking.mlp_units: {choices: [[64], [128, 64]]}
    width:
      sets:
        narrow: {content.dim: 32, embedding.dim: 32}
        wide: {content.dim: 64, embedding.dim: 64}

A range whose ends are integers has integers, any other has floats. `sets` name groups of settings
that belong together; the name before it is free.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from recsys.config import load_config
from recsys.config.plain_yaml import load_plain_yaml

RANGE_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Parameter:
    """A setting, or a group of settings, and the values that it may have.

    name: full name of the setting, or name of the group.
    distribution: Optuna's form of the values; lists and groups are choices by JSON text or name.
    sets: settings of each group by its name; empty for a single setting.
    """

    name: str
    distribution: BaseDistribution
    sets: Mapping[str, Mapping[str, Any]]

    def settings(self, value: Any) -> dict[str, Any]:
        """Return settings by full name for a value as Optuna stores it."""
        if self.sets:
            return dict(self.sets[value])
        is_choice = isinstance(self.distribution, CategoricalDistribution)
        return {self.name: json.loads(value) if is_choice else value}

    def extremes(self) -> list[Any]:
        """Return the ends of a range, or all choices, as Optuna stores them."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, IntDistribution | FloatDistribution)
        return [self.distribution.low, self.distribution.high]

    def grid(self) -> list[Any]:
        """Return all values, as Optuna stores them.

        Raises:
            ValueError: the parameter is a range of floats without a step.
        """
        ranged = self.distribution
        if isinstance(ranged, CategoricalDistribution):
            return list(ranged.choices)
        if isinstance(ranged, IntDistribution) and not ranged.log:
            return list(range(ranged.low, ranged.high + 1, ranged.step))
        if isinstance(ranged, FloatDistribution) and ranged.step is not None:
            count = round((ranged.high - ranged.low) / ranged.step) + 1
            return [round(ranged.low + number * ranged.step, 12) for number in range(count)]
        raise ValueError(
            f"--space: '{self.name}' has no list of values for --sampler grid; give a step or "
            "choices, or take tpe or random"
        )


def read_space(file: Path) -> list[Parameter]:
    """Read a search space.

    Raises:
        ValueError: the file is missing or is no search space; names parameter and fix.

    Example::

        read_space(Path("space.yaml"))[0].name  # "optimizer.learning_rate"
    """
    if not file.is_file():
        raise ValueError(f"--space {file}: no such file; give a YAML file of settings")
    try:
        given = load_plain_yaml(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--space {file}: {error}") from error
    if not isinstance(given, dict) or not given:
        raise ValueError(
            f"--space {file}: give settings and their values, such as "
            "`ranking.dropout: {low: 0.0, high: 0.5}`"
        )
    space = [_parameter(f"--space {file}: '{name}'", name, of) for name, of in given.items()]
    _refuse_shared_settings(file, space)
    return space


def _parameter(place: str, name: str, given: Any) -> Parameter:
    keys = set(given) if isinstance(given, dict) else set()
    if keys == {"choices"}:
        choices = _choices(place, given["choices"], list)
        return Parameter(name, CategoricalDistribution([json.dumps(one) for one in choices]), {})
    if keys == {"sets"}:
        sets = _choices(place, given["sets"], dict)
        for group, settings in sets.items():
            if not isinstance(settings, dict):
                raise ValueError(
                    f"{place}: '{group}' is {settings!r}; give settings by their full names, such "
                    "as {ranking.dropout: 0.1}, or {} for the recipe itself"
                )
        return Parameter(name, CategoricalDistribution(list(sets)), sets)
    if not {"low", "high"} <= keys or keys - set(RANGE_KEYS):
        raise ValueError(
            f"{place} is {given!r}; give {{low: .., high: ..}} with log: true or a step, "
            "{choices: [..]} or {sets: {NAME: {..}}}"
        )
    return Parameter(name, _range(place, given), {})


def _choices(place: str, given: Any, kind: type[Any]) -> Any:
    """Check that choices are a list, or groups a mapping, and return them."""
    if type(given) is not kind or not given:
        form = "[..]" if kind is list else "{NAME: {..}}"
        raise ValueError(f"{place}: has {given!r} for its choices; give {form}")
    if len({json.dumps(one) for one in given}) < len(given):
        raise ValueError(f"{place}: names a choice twice: {given}")
    return given


def _range(place: str, given: Mapping[str, Any]) -> BaseDistribution:
    low, high, step = given["low"], given["high"], given.get("step")
    numbers = [low, high] if step is None else [low, high, step]
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
        raise ValueError(f"{place} is {given!r}; low, high and step are numbers")
    if low >= high:
        raise ValueError(f"{place}: low {low} is not below high {high}")
    if not isinstance(given.get("log", False), bool):
        raise ValueError(f"{place}: log is {given['log']!r}; give true or false")
    is_log = given.get("log", False)
    try:
        if all(isinstance(one, int) for one in numbers):
            return IntDistribution(low, high, log=is_log, step=1 if step is None else step)
        return FloatDistribution(low, high, log=is_log, step=step)
    except ValueError as error:
        raise ValueError(f"{place} is {given!r}: {error}") from error


def _refuse_shared_settings(file: Path, space: Sequence[Parameter]) -> None:
    """Raise a ValueError if two parameters give values to one setting."""
    owners: dict[str, str] = {}
    for parameter in space:
        names = {name for value in parameter.extremes() for name in parameter.settings(value)}
        for name in sorted(names):
            if name in owners:
                raise ValueError(
                    f"--space {file}: '{owners[name]}' and '{parameter.name}' both give values to "
                    f"{name}; leave one of them out"
                )
            owners[name] = parameter.name


def words_of(space: Sequence[Parameter], values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values, by parameter as Optuna stores them, as words of a command line."""
    settings: dict[str, Any] = {}
    for parameter in space:
        settings |= parameter.settings(values[parameter.name])
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def check_space(space: Sequence[Parameter], recipe: Path) -> None:
    """Check that the recipe accepts the ends of each range and each choice, one at a time.

    Raises:
        ValueError: it does not; names parameter, value and cause.
    """
    for parameter in space:
        for value in parameter.extremes():
            words = words_of([parameter], {parameter.name: value})
            try:
                load_config(recipe, words)
            except ValueError as error:
                cause = str(error).removeprefix(f"config {recipe}: ")
                raise ValueError(
                    f"--space: '{parameter.name}' {value}: {cause}\nSettings that need each other "
                    "belong into one of its `sets`"
                ) from error


def grid_of(space: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Yield every combination of values, the last parameter's fastest."""
    names = [parameter.name for parameter in space]
    for values in itertools.product(*(parameter.grid() for parameter in space)):
        yield dict(zip(names, values, strict=True))
