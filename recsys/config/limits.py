"""Number types with limits, and a check of nested settings against the limits."""

import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jsonargparse import typing

PositiveInt = Annotated[int, typing.PositiveInt]
NonNegativeInt = Annotated[int, typing.NonNegativeInt]
UnitInterval = Annotated[float, typing.OpenUnitInterval]


def _limited(name: str, kind: type, *limits: tuple[str, float]) -> Any:
    text = " and ".join(f"{sign} {limit}" for sign, limit in limits)
    return typing.restricted_number_type(name, kind, list(limits), docstring=text)


# Larger values are typos, which would end in an out-of-memory error or take hours to build.
Width = Annotated[int, _limited("Width", int, (">", 0), ("<=", 2**20))]
NumLayers = Annotated[int, _limited("NumLayers", int, (">=", 0), ("<=", 1000))]
Pixels = Annotated[int, _limited("Pixels", int, (">", 0), ("<=", 8192))]
# numpy takes no negative seed; seed plus rank and step must fit the 64 bits of torch's seeds.
Seed = Annotated[int, _limited("Seed", int, (">=", 0), ("<", 2**63))]
NonNegativeFloat = Annotated[
    float, _limited("FiniteNonNegative", float, (">=", 0), ("<", math.inf))
]
PositiveFloat = Annotated[float, _limited("FinitePositive", float, (">", 0), ("<", math.inf))]
Seconds = Annotated[float, _limited("FiniteSeconds", float, (">=", 1), ("<", math.inf))]
Share = Annotated[float, typing.ClosedUnitInterval]
Dropout = Annotated[float, _limited("Dropout", float, (">=", 0), ("<", 1))]
PositiveShare = Annotated[float, _limited("PositiveShare", float, (">", 0), ("<=", 1))]


def check_settings(value: Any, name: str = "", hint: Any = None) -> None:
    """Check every number against its limit, and call the method `check(name)` of every dataclass.

    `name` is the setting's full name, empty at the top; `hint` is the annotation of a plain value.
    """
    if is_dataclass(value):
        for field, field_hint in get_type_hints(type(value), include_extras=True).items():
            check_settings(getattr(value, field), f"{name}.{field}".lstrip("."), field_hint)
        if hasattr(value, "check"):
            value.check(name)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_settings(item, f"{name}.{key}", hint)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_settings(item, f"{name}[{index}]", hint)
    elif isinstance(value, int | float):
        for limit in _limits(hint):
            try:
                limit(value)
            except ValueError as error:
                text = str(limit.__doc__).rpartition(" restricted to be ")[2]
                text = re.sub(r"([<>]=?)(?=\d)", r"\1 ", text)
                raise ValueError(f"{name} is {value}; it must be {text}") from error


def _limits(hint: Any) -> Iterator[type]:
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    for inner_hint in get_args(hint):
        if get_origin(inner_hint) is not None:
            yield from _limits(inner_hint)


def refuse_options(name: str, value: str, options: dict[str, Any]) -> None:
    """Raise a ValueError for options of a built-in class: only user-defined ones have options."""
    if options and ":" not in value:
        raise ValueError(
            f"{name}.options are for a class of your own, but {name}.name is '{value}'; remove them"
        )
