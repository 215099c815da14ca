"""Chains of steps, from `column` and `transform` of a column in `schema.yaml`.

`column` names columns of the file or of other transforms, such as `{kind: dense, column: price,
transform: [{fill: 0}, log1p, standardize]}`. `transforms.yaml` has the chains with fitted values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from recsys.config.parser import meant, problem_of_keys, short
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.schema_columns import Column
from recsys.data.transforms.steps import STEPS, Fit
from recsys.storage.location import Location, errors_at

KINDS = ("id", "ids", "dense")
INPUTS = (*KINDS, "sequence")  # kinds that may be the source of another column
FILE = "transforms.yaml"
HEAD = "# Written by `recsys prepare transforms`: fitted on the rows in train/.\n"


@dataclass(frozen=True)
class Call:
    """One step of a chain with all its settings."""

    name: str
    settings: dict[str, Any]

    @staticmethod
    def of(step: Any) -> Call:
        """Parse a step of `schema.yaml`, a name or {name: settings}; a ValueError if unusable."""
        step = {step: {}} if isinstance(step, str) else step
        if not isinstance(step, dict) or len(step) != 1:
            raise ValueError(f"{short(step)} is no step; write a name, or {{name: settings}}")
        [(name, settings)] = step.items()
        if name not in STEPS:
            raise ValueError(f"'{name}' is no step, but {list(STEPS)}{meant(str(name), STEPS)}")
        function = STEPS[name].apply
        parameters = list(inspect.signature(function).parameters.values())[1:]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        hints = {setting: get_type_hints(function)[setting] for setting in defaults}
        if not isinstance(settings, dict):
            settings = dict(zip(list(defaults)[:1] or ["settings"], [settings], strict=True))
        unset = {setting: value for setting, value in defaults.items() if setting not in settings}
        required = [setting for setting in unset if unset[setting] is inspect.Parameter.empty]
        problem = problem_of_keys(hints, settings, name) or _unusable(settings)
        if problem or required:
            raise ValueError(problem or f"{name} needs {required[0]}")
        call = Call(name, settings | unset)
        call([pa.nulls(0), pa.nulls(0)])  # the function checks its settings
        return call

    @property
    def is_fitted(self) -> bool:
        return all(self.settings[name] is not None for name in self.fitted_settings)

    @property
    def fitted_settings(self) -> tuple[str, ...]:
        """Settings that a fit computes; empty for given boundaries without quantiles."""
        return () if self.settings.get("quantiles", 0) is None else STEPS[self.name].fitted

    @property
    def without_fit(self) -> Call:
        return Call(self.name, self.settings | dict.fromkeys(self.fitted_settings))

    def start_fit(self) -> Fit:
        fit = STEPS[self.name].fit
        assert fit is not None
        return fit(**self.settings)

    def plain(self) -> dict[str, Any]:
        settings = self.settings.items()
        return {self.name: {name: value for name, value in settings if value is not None}}

    def __call__(self, columns: list[pa.Array]) -> list[pa.Array]:
        """Apply the step to the values of each column, or of all columns together."""
        step = STEPS[self.name]
        if not self.is_fitted and any(map(len, columns)):
            raise ValueError("is not fitted yet; run `recsys prepare transforms --data DATA`")
        if step.joins:
            return [step.apply(columns, **self.settings)]
        return [step.apply(values, **self.settings) for values in columns]


def _unusable(settings: dict[str, Any]) -> str | None:
    """Return an error message if a setting is NaN, or None."""
    for name, value in settings.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and np.isnan(number) for number in numbers):
            return f"{name} is {short(value)}; NaN is no number"
    return None


@dataclass(frozen=True)
class Chain:
    """The source columns of a transformed column, and its steps."""

    sources: tuple[str, ...]
    steps: tuple[Call, ...]

    @property
    def joins(self) -> bool:
        return any(STEPS[step.name].joins for step in self.steps)

    @property
    def unfitted(self) -> int | None:
        """Number of the first step that is not fitted; None if all are."""
        return next((i for i, step in enumerate(self.steps) if not step.is_fitted), None)

    @property
    def without_fit(self) -> Chain:
        return Chain(self.sources, tuple(step.without_fit for step in self.steps))

    def fitted(self, number: int, settings: dict[str, Any]) -> Chain:
        step = self.steps[number]
        fitted = Call(step.name, step.settings | settings)
        return Chain(self.sources, (*self.steps[:number], fitted, *self.steps[number + 1 :]))

    def is_fit_of(self, chain: Chain) -> bool:
        """Return whether this is `chain` with all steps fitted."""
        pairs = zip(self.steps, chain.steps, strict=False)
        steps = (step if target.is_fitted else step.without_fit for step, target in pairs)
        return self.unfitted is None and chain == Chain(self.sources, tuple(steps))

    def plain(self) -> dict[str, Any]:
        return {"column": list(self.sources), "transform": [step.plain() for step in self.steps]}

    def __call__(self, columns: list[pa.Array]) -> pa.Array:
        columns = [_read(values) for values in columns]
        for step in self.steps:
            try:
                columns = step(columns)
            except (ValueError, pa.ArrowException) as error:
                raise ValueError(f"step {step.name} {error}") from error
        [values] = columns
        return values


def _read(values: pa.Array) -> pa.Array:
    """Return a file's values with floats rounded to float32 (stored as float64), NaN as null."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        values = values.cast(pa.float32(), safe=False).cast(pa.float64())
        return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    return values


def chain_of(name: str, column: Column) -> Chain:
    """Return the chain of a transformed column; a ValueError names an unusable step."""
    sources, steps = column.sources(name), []
    for number, step in enumerate(column.transform):
        with errors_at(f"transform, step {number + 1}"):
            steps.append(Call.of(step))
    joins = [number for number, step in enumerate(steps) if STEPS[step.name].joins]
    if len(sources) != 1 and len(joins) != 1:
        raise ValueError(f"reads {len(sources)} columns; name one, or join them by one step cross")
    if len(sources) == 1 and joins:
        raise ValueError(f"cross joins several columns; write `column: [{sources[0]}, ANOTHER]`")
    if any(STEPS[step.name].fit is not None for step in steps[: joins[0] if joins else 0]):
        raise ValueError("a step before cross is fitted; make a column of its own with that step")
    num_ids = STEPS[steps[-1].name].num_ids if steps else None
    size = None if num_ids is None else num_ids(**steps[-1].settings)
    if column.vocabulary is None and (column.num_embeddings or size or 0) < (size or 0):
        raise ValueError(
            f"num_embeddings is {column.num_embeddings}, but {steps[-1].name} gives {size} ids; "
            f"set it to {size}"
        )
    return Chain(tuple(sources), tuple(steps))


def chains_of(columns: Mapping[str, Column], target_item: str, path: str) -> dict[str, Chain]:
    """Return the checked chains by column, and store them in the columns with all defaults."""
    chains: dict[str, Chain] = {}
    for name, column in columns.items():
        if column.column is None and not column.transform:
            continue
        where = f"{path}: column '{name}'"
        if column.kind not in KINDS or name == target_item:
            role = "the target item" if name == target_item else f"of kind {column.kind}"
            raise ValueError(f"{where} is {role}; only features of kinds {KINDS} are transformed")
        with errors_at(where):
            chains[name] = chain_of(name, column)
        for source in chains[name].sources:
            if source in columns and columns[source].kind not in INPUTS:
                raise ValueError(
                    f"{where} reads '{source}', which is of kind {columns[source].kind} and is not "
                    "known when a model is asked; name another column"
                )
    try:
        TopologicalSorter({name: transformed_sources(name, chains) for name in chains}).prepare()
    except CycleError as error:
        names = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"{path}: columns read each other: {names}; end the circle") from error
    for name, chain in chains.items():
        set_chain(columns[name], chain)
    return chains


def set_chain(column: Column, chain: Chain) -> None:
    """Store a chain in its column, in the form of `schema.yaml`."""
    plain = chain.plain()
    column.column, column.transform = plain["column"], plain["transform"]


def transformed_sources(name: str, chains: Mapping[str, Chain]) -> list[str]:
    """Return the sources of a transformed column that are results of other chains."""
    return [source for source in chains[name].sources if source != name and source in chains]


def file_columns(names: Iterable[str], chains: Mapping[str, Chain]) -> list[str]:
    """Return the columns of the files that the columns `names` need, each once."""
    columns: dict[str, None] = {}
    for name in names:
        if name not in chains:
            columns[name] = None
            continue
        results = transformed_sources(name, chains)
        columns |= dict.fromkeys(source for source in chains[name].sources if source not in results)
        columns |= dict.fromkeys(file_columns(results, chains))
    return list(columns)


def write_fitted(chains: Mapping[str, Chain], root: Location) -> None:
    """Write the chains of a dataset to its `transforms.yaml`, atomically."""
    partial = root / f".{FILE}.partial"
    content = {name: chain.plain() for name, chain in chains.items()}
    text = HEAD + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    partial.filesystem.pipe_file(partial.path, text.encode())
    partial.filesystem.mv(partial.path, (root / FILE).path)


def load_fitted(
    chains: dict[str, Chain], columns: Mapping[str, Column], root: Location, required: bool
) -> None:
    """Replace `chains` by the fitted ones in `transforms.yaml`; the file may be `required`."""
    unfitted = [name for name, chain in chains.items() if chain.unfitted is not None]
    file, command = root / FILE, f"run `recsys prepare transforms --data {root}`"
    if not unfitted or not (required or file.exists()):
        return
    if not file.exists():
        raise ValueError(
            f"{file}: no such file, but the transforms of columns {unfitted} need values fitted on "
            f"train/; {command}"
        )
    try:
        stored = load_plain_yaml(file.read_bytes())
        fitted = {name: chain_of(name, Column("dense", **keys)) for name, keys in stored.items()}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({' '.join(str(error).split())}); {command}") from error
    for name, chain in chains.items():
        if name not in fitted or not fitted[name].is_fit_of(chain):
            raise ValueError(
                f"{file}: was fitted with other transforms than schema.yaml has now: column "
                f"'{name}' differs; {command}"
            )
        chains[name] = fitted[name]
        set_chain(columns[name], fitted[name])
