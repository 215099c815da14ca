"""The search space: settings with the values that trials may choose.

A YAML file maps settings by full name to ranges or choices::

    optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    ranking.mlp_units: {choices: [[64], [128, 64]]}
    width: {sets: {narrow: {content.dim: 32}, wide: {content.dim: 64}}}

A range with integer ends yields integers. `sets` names groups of settings.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from recsys.config import load_config
from recsys.config.plain_yaml import load_plain_yaml

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Parameter:
    """A setting or a group of settings, with its possible values."""

    name: str
    distribution: Distribution  # choices are JSON texts, groups are names
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of a group, by name

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
        return [self.distribution.low, self.distribution.high]

    def grid(self) -> list[Any]:
        """Return all values, as Optuna stores them; a ValueError for floats without a step."""
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution):
            return self.extremes()
        if distribution.step is None or distribution.log:
            raise ValueError(
                f"--space: '{self.name}' has no list of values for --sampler grid; give a step or "
                "choices, or take tpe or random"
            )
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [round(distribution.low + number * distribution.step, 12) for number in range(count)]


def read_space(file: Path) -> list[Parameter]:
    """Read a search space; a missing file or a bad entry is a ValueError."""
    if not file.is_file():
        raise ValueError(f"--space {file}: no such file; give a YAML file of settings")
    try:
        entries = load_plain_yaml(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--space {file}: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"--space {file}: give settings and their values, such as "
            "`ranking.dropout: {low: 0.0, high: 0.5}`"
        )
    space = [_parameter(f"--space {file}: '{name}'", name, e) for name, e in entries.items()]
    owners: dict[str, str] = {}
    for parameter in space:
        for name in {name for value in parameter.extremes() for name in parameter.settings(value)}:
            if owners.setdefault(name, parameter.name) != parameter.name:
                raise ValueError(
                    f"--space {file}: '{owners[name]}' and '{parameter.name}' both give values to "
                    f"{name}; leave one of them out"
                )
    return space


def _parameter(location: str, name: str, entry: Any) -> Parameter:
    match entry:
        case {"choices": [_, *_] as choices, **rest} if not rest:
            texts = [json.dumps(choice) for choice in choices]
            if len(set(texts)) < len(texts):
                raise ValueError(f"{location}: names a choice twice: {choices}")
            return Parameter(name, CategoricalDistribution(texts))
        case {"sets": {} as sets, **rest} if sets and not rest:
            if all(isinstance(settings, dict) for settings in sets.values()):
                return Parameter(name, CategoricalDistribution(list(sets)), sets)
        case {"low": _, "high": _, **rest} if rest.keys() <= {"log", "step"}:
            types = {type(number) for key, number in entry.items() if key != "log"}
            if types <= {int, float} and isinstance(rest.get("log", False), bool):
                try:
                    kind = IntDistribution if types == {int} else FloatDistribution
                    return Parameter(name, kind(**entry))
                except ValueError as error:
                    raise ValueError(f"{location} is {entry!r}: {error}") from error
    raise ValueError(
        f"{location} is {entry!r}; give numbers {{low: .., high: ..}} with log: true or a step, "
        "{choices: [..]}, or {sets: {NAME: {SETTING: ..}}}, where {} is the recipe itself"
    )


def arguments_of(space: Sequence[Parameter], values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values, by parameter as Optuna stores them, as command-line arguments."""
    arguments: list[str] = []
    for parameter in space:
        for name, value in parameter.settings(values[parameter.name]).items():
            arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def check_space(space: Sequence[Parameter], recipe: Path) -> None:
    """Raise a ValueError unless the recipe accepts each choice and each end of a range alone."""
    for parameter in space:
        for value in parameter.extremes():
            try:
                load_config(recipe, arguments_of([parameter], {parameter.name: value}))
            except ValueError as error:
                cause = str(error).removeprefix(f"config {recipe}: ")
                raise ValueError(
                    f"--space: '{parameter.name}' {value}: {cause}\nSettings that need each other "
                    "belong into one of its `sets`"
                ) from error


def grid_of(space: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Return every combination of values; the last parameter changes fastest."""
    names = [parameter.name for parameter in space]
    grids = [parameter.grid() for parameter in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*grids)]
