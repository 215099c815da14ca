"""Parts that a configuration names: built in, or user-defined as `package.module:Class`.

Built-in parts are listed by import path, so that a module can list parts of higher packages.
"""

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def find_part(setting: str, name: str, paths: Mapping[str, str]) -> Any:
    """Import and return the part that a setting names: a key of `paths`, or `package.module:Class`.

    An unknown name, or one that cannot be imported, is a ValueError.
    """
    path = paths.get(name, name)
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        choices = f"choose one of {sorted(paths)}, or name" if paths else "name"
        raise ValueError(
            f"{setting} '{name}' is unknown; {choices} one of your own as package.module:Class"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise any error
        raise ValueError(
            f"{setting} '{name}' cannot be imported ({type(error).__name__}: {error})"
        ) from error


def make_part(
    setting: str,
    name: str,
    paths: Mapping[str, str],
    kind: type[T],
    *arguments: Any,
    **keywords: Any,
) -> T:
    """Call the class or function that a setting names (`find_part`), and return its result.

    An exception of the call, or a result that is not a `kind`, is a ValueError.
    """
    build = find_part(setting, name, paths)
    try:
        result = build(*arguments, **keywords)
    except ValueError:
        raise
    except Exception as error:  # a user's class may raise any error
        raise ValueError(
            f"{setting} '{name}' cannot be made ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(result, kind):
        raise ValueError(f"{setting} '{name}' is a {type(result).__name__}, not a {kind.__name__}")
    return result
