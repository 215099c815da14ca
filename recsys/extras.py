"""Extras: packages that one command needs, and that an installation may lack."""

from importlib import import_module


def missing_extra(extra: str, user: str, problem: object) -> ValueError:
    """Return the error of a command, the `user`, that needs the packages of an extra."""
    return ValueError(
        f"{user} needs the extra `{extra}` ({problem}); install it: pip install "
        f"'recsys-em3[{extra}]', or in the sources python3 launch/install.py --extra {extra}"
    )


def require_extra(extra: str, user: str, package: str) -> None:
    """Import a package of an extra; where it is not installed, raise the error of that extra."""
    try:
        import_module(package)
    except ImportError as error:
        raise missing_extra(extra, user, error) from error
