"""Extras: packages that one command needs, and that an installation may lack."""

from __future__ import annotations

import re
from importlib.metadata import requires


def missing_extra(extra: str, user: str, problem: object) -> ValueError:
    """Return the error of a command that needs the packages of an extra.

    It names these one by one: `pip install recsys-em3[NAME]` would also install what torchrec
    requires, and so the FBGEMM for CUDA that no machine without an NVIDIA driver can import.

    Args:
        extra: its name in pyproject.toml.
        user: what needs it.
        problem: what is missing.
    """
    lines = [line.split(";") for line in requires("recsys-em3") or ()]
    packages = " ".join(
        f"'{name.strip()}'"
        for name, *marker in lines
        if re.search(f"extra == .{extra}.", "".join(marker))
    )
    return ValueError(
        f"{user} needs the extra `{extra}` ({problem}); install it: pip install {packages}, "
        f"or in the sources python3 launch/install.py --extra {extra}"
    )
