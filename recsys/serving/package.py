"""A package: the files that answer requests, listed with their sizes and hashes in a manifest.

`manifest.json` describes the package; `schema.yaml` and `vocabulary/` have the columns of the
run; `graph.pt2` is the ranking model by torch.export; `tables/*.vectors` are the ID tables and
`content/*.vectors` the content vectors of the items; `request.json` is an example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

FORMAT = 1
MANIFEST = "manifest.json"
GRAPH = "graph.pt2"
REQUEST = "request.json"


@dataclass
class Manifest:
    """Contents of a package.

    labels: names of the outputs. pooled, dense, parallel: columns in the order of the graph.
    tables: layout of each table's file, by table; content: layouts of the files `target` and
    `history`, none without content. searches: the graph also reads the candidates' vectors in the
    memory bank. bounded: tables whose map of raw ids was learned in training. content_histories:
    further histories whose content is read.
    """

    run: str
    ranking: str
    labels: list[str]
    pooled: list[str]
    dense: list[str]
    parallel: list[str]
    target_item: str
    history: str | None
    tables: dict[str, dict[str, Any]]
    content: dict[str, dict[str, Any]]
    searches: bool
    bounded: list[str]
    versions: dict[str, str]
    created: str
    content_histories: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # bytes and sha256 by name
    format: int = FORMAT


class Listed(Protocol):
    """A manifest: a dataclass with the files of a folder."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    files: dict[str, dict[str, Any]]


M = TypeVar("M", bound=Listed)


def write_manifest(folder: Path, manifest: Listed) -> None:
    """Hash the files of a folder and write its manifest, with a hash of its own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest.files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in files
    }
    content = asdict(manifest)
    content["sha256"] = _own_digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, verify: bool = True) -> Manifest:
    """Read a package's manifest and check its files.

    Args:
        folder: the package.
        verify: read every file and compare its hash; else only sizes are compared.

    Raises:
        ValueError: the folder is no package, of another format, or a file differs; it is named.
    """
    return read_manifest_of(folder, Manifest, "package", "recsys export", verify)


def read_manifest_of(folder: Path, kind: type[M], what: str, command: str, verify: bool) -> M:
    """Read a manifest of one kind and check the files of its folder.

    Args:
        folder: the folder.
        kind: dataclass of the manifest.
        what: the folder in words, for messages.
        command: what makes such a folder.
        verify: read every file and compare its hash; else only sizes are compared.

    Raises:
        ValueError: the folder is none of that kind, of another format, or a file differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {what} ({MANIFEST} is missing); make one by {command}")
    try:
        content = json.loads(path.read_bytes())
        if (number := content.get("format")) != FORMAT:
            raise ValueError(f"format {number}, but this version reads {FORMAT}")
        if content.pop("sha256", None) != _own_digest(content):
            raise ValueError("its content differs from its hash")
        manifest = kind(**content)
        differences = list(_differences(folder, manifest, verify))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; export the run again") from error
    for difference in differences:
        raise ValueError(f"{difference}; export the run again, or copy the package again")
    return manifest


def digest_of(manifest: Manifest) -> str:
    """Return the hash of a manifest, which differs between any two packages."""
    return _own_digest(asdict(manifest))


def differing_versions(manifest: Manifest) -> list[str]:
    """Describe each library of which the package was written with another minor version."""
    found = []
    for name, written in manifest.versions.items():
        try:
            now = version(name)
        except PackageNotFoundError:
            now = "not installed"
        if written.split(".")[:2] != now.split(".")[:2]:
            found.append(f"{name} {written} (here: {now})")
    return found


def _differences(folder: Path, manifest: Listed, verify: bool) -> Iterator[str]:
    for name, of_file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: no such file"
        elif path.stat().st_size != of_file["bytes"]:
            yield f"{path}: {path.stat().st_size:,} bytes instead of {of_file['bytes']:,}"
        elif verify and _digest(path) != of_file["sha256"]:
            yield f"{path}: its content differs from the manifest"


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
