"""A package: the files that answer requests, listed with sizes and hashes in a manifest.

`graph.pt2` is the ranking model by torch.export, `compiled.pt2` its machine code. ID tables are in
`tables/*.vectors`, content vectors in `content/*.vectors`, the encoder of new items in `items/`.
"""

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from recsys.storage.manifest import (
    VerifiedFiles,
    content_digest,
    describe_all,
    differences,
    read_signed,
    write_signed,
)

FORMAT = 2
MANIFEST = "manifest.json"
GRAPH = "graph.pt2"
REQUEST = "request.json"
STATISTICS = "statistics.json"  # of training rows by column; the server counts those of requests
LIBRARIES = ("torch", "torchrec", "recsys-em3")

PackagePrecision = Literal["run", "bf16"]


@dataclass(kw_only=True)
class BaseManifest:
    """The origin and date of the files in a folder; bytes and sha256 of each by name.

    `contents` and `command` name the folder and its writer in messages.
    """

    contents: ClassVar[str]
    command: ClassVar[str]
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in LIBRARIES}
    )
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass
class Manifest(BaseManifest):
    """Contents of a package."""

    contents, command = "package", "recsys export"
    run: str
    ranking: str
    labels: list[str]  # names of the outputs
    pooled: list[str]  # columns in the order of the graph
    dense: list[str]
    parallel: list[str]
    target_item: str
    history: str | None
    tables: dict[str, dict[str, Any]]  # layout of each table's file
    content: dict[str, dict[str, Any]]  # layouts of the files `target` and `history`
    searches: bool  # the graph also reads the candidates' vectors in the memory bank
    bounded: list[str]  # tables whose map of raw ids was learned in training
    content_histories: list[str] = field(default_factory=list)  # further ones with content
    entry_shapes: dict[str, list[int]] = field(default_factory=dict)  # of an item, by modality
    compiled: dict[str, str] = field(default_factory=dict)  # what the machine code needs
    precision: PackagePrecision = "run"
    added: dict[str, Any] = field(default_factory=dict)  # number and layout of added items
    model: str | None = None  # hash of the run's model; None: of a run without one


M = TypeVar("M", bound=BaseManifest)


def write_manifest(folder: Path, manifest: BaseManifest, excluded: str | None = None) -> None:
    """Hash the files of a folder, except the folder `excluded`, and write its signed manifest."""
    inner = None if excluded is None else folder / excluded
    manifest.files = describe_all(
        folder,
        sorted(path for path in folder.rglob("*") if path.is_file() and inner not in path.parents),
    )
    write_signed(folder / MANIFEST, asdict(manifest))


def read_manifest_of(
    kind: type[M], folder: Path, verify: bool = True, verified: VerifiedFiles | None = None
) -> M:
    """Read a manifest of one kind and check its files, by their hashes or only by their sizes.

    Files in `verified` are not read again; those that are read are added. A folder of another
    kind or format, or with a file that differs, is a ValueError that names it.
    """
    path, contents, command = folder / MANIFEST, kind.contents, kind.command
    if not path.is_file():
        raise ValueError(f"{folder}: no {contents} ({MANIFEST} is missing); make one by {command}")
    try:
        content = read_signed(path, FORMAT)
        if not content.keys() <= {attribute.name for attribute in fields(kind)}:
            raise ValueError(f"another command than {command} wrote it, so this is no {contents}")
        manifest = kind(**content)
        difference = next(differences(folder, manifest.files, verify, verified), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; export the run again") from error
    if difference is not None:
        raise ValueError(f"{difference}; export the run again, or copy the package again")
    return manifest


read_manifest = partial(read_manifest_of, Manifest)


def digest_of(manifest: Manifest) -> str:
    """Return the hash of a manifest, which differs between any two packages."""
    return content_digest(asdict(manifest))


def differing_versions(manifest: Manifest) -> list[str]:
    """Describe libraries whose minor version differs from the one that wrote the package."""
    differing = []
    for name, stored in manifest.versions.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "not installed"
        if stored.split(".")[:2] != installed.split(".")[:2]:
            differing.append(f"{name} {stored} (here: {installed})")
    return differing
