"""A package with later features: all other files are those of a package, by hard links."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.checkpoint.run_schema import load_run_schema
from recsys.data.schema import Schema
from recsys.serving.features.package_features import FOLDER, PackageFeatures, write_features
from recsys.serving.new_items.added_items import FEATURES, AddedItems
from recsys.serving.new_items.added_items import FOLDER as ADDED
from recsys.serving.package import Manifest, read_manifest, replace_manifest
from recsys.storage.files import link_or_copy, whole_folder
from recsys.storage.location import Location
from recsys.storage.manifest import describe_all


def refresh_features(package: Path, data: str, out: Path) -> Manifest:
    """Write a package with the last known features of a dataset; it appears whole or not at all.

    Features of items that were added to the package stay where the dataset has none.

    Raises:
        ValueError: the package looks up no features, the dataset lacks some, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or name another folder")
    manifest, schema = read_manifest(package, verify=False), load_run_schema(package)
    if not schema.features:
        raise ValueError(f"{package}: looks up no features; export the run with a newer dataset")
    kept = {
        name: file for name, file in manifest.files.items() if not name.startswith(f"{FOLDER}/")
    }
    with whole_folder(out) as partial:
        for name in kept:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(package / name, partial / name)
        write_features(Location.of(data), schema, partial)
        changed = [*(partial / FOLDER).iterdir()]
        if (added := AddedItems.open(package, manifest.added)).features is not None:
            changed.append(_keep_unknown(partial, schema, added))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        described = describe_all(partial, sorted(changed))
        manifest = replace(manifest, files=kept | described, created=created)
        replace_manifest(partial, manifest)
    return manifest


def _keep_unknown(package: Path, schema: Schema, added: AddedItems) -> Path:
    """Keep the features of added items that the files of a package do not have."""
    path = package / ADDED / str(added.number) / FEATURES
    features = PackageFeatures(package, schema)
    table = next(part for part in schema.features if part.by == [schema.target_item])
    rows = added.features
    assert rows is not None
    is_known = features.knows(table, [rows[schema.target_item].combine_chunks()])
    path.unlink()  # a link to the file of the other package
    pq.write_table(rows.filter(pc.invert(is_known)), path)
    return path
