"""Extras: packages that one command needs, and that an installation may lack."""

from __future__ import annotations


def missing_extra(extra: str, user: str, problem: object) -> ValueError:
    """Return the error of a command that needs the packages of an extra.

    Args:
        extra: its name in pyproject.toml.
        user: what needs it.
        problem: what is missing.
    """
    return ValueError(
        f"{user} needs the extra `{extra}` ({problem}); install it: "
        f"pip install 'recsys-em3[{extra}]', or in the sources "
        f"python3 launch/install.py --extra {extra}"
    )
