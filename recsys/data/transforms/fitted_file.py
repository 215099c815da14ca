"""`transforms.yaml` of a dataset: its transformed columns with all values fitted on train/.

The file repeats the fitted chains, so that values of another chain are never used.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.filesystem import Location
from recsys.data.schema_columns import Column
from recsys.data.transforms.chain import Chain, chain_of, set_chain

FILE = "transforms.yaml"
HEAD = "# Written by `recsys prepare transforms`: fitted on the rows in train/.\n"


def write_fitted(chains: Mapping[str, Chain], root: Location) -> Location:
    """Write the chains of a dataset to a file, complete or not at all, and return the file."""
    file, partial = root / FILE, root / f".{FILE}.partial"
    content = {name: chain.plain() for name, chain in chains.items()}
    text = HEAD + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    file.filesystem.pipe_file(partial.path, text.encode())
    file.filesystem.mv(partial.path, file.path)
    return file


def load_fitted(
    chains: dict[str, Chain], columns: Mapping[str, Column], root: Location, required: bool
) -> None:
    """Put the fitted values of the dataset at `root` into the chains of its schema's columns.

    Raises:
        ValueError: the file is missing though required, damaged, or of other chains.
    """
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
        fitted = {name: chain_of(name, Column("dense", **of)) for name, of in stored.items()}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({' '.join(str(error).split())}); {command}") from error
    for name, chain in chains.items():
        if name not in fitted or not fitted[name].is_fit_of(chain):
            raise ValueError(
                f"{file}: was fitted with other transforms than schema.yaml has now: column "
                f"'{name}' differs; {command}"
            )
    for name in chains:
        chains[name] = fitted[name]
        set_chain(columns[name], fitted[name])
