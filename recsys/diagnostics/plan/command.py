"""Runs `recsys describe --config FILE --data DATA [--nodes N --gpus-per-node G ...]`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from embeddings.device_figures import FigureOverrides
from recsys.config import Config
from recsys.data.filesystem import write_whole
from recsys.diagnostics.plan.description import Description, describe
from recsys.diagnostics.plan.report import format_description
from recsys.diagnostics.plan.this_machine import find_cluster
from recsys.distributed.log import print_table
from recsys.storage.output_file import check_output

logger = logging.getLogger(__name__)


def describe_run(
    config: Config,
    data: str,
    device: str,
    nodes: int,
    gpus_per_node: int | None,
    rows: list[str],
    figures: FigureOverrides,
    json_file: Path | None,
) -> Description:
    """Describe a run, print the description, and write the numbers to `json_file`.

    Raises:
        ValueError: the cluster is invalid, `json_file` cannot be written, or the configuration does
            not match the data.
    """
    if json_file is not None:
        check_output(json_file)
    cluster = find_cluster(device, nodes, gpus_per_node, figures, config.precision)
    found = describe(config, data, cluster, parse_rows(rows))
    print_table(format_description(found))
    if json_file is not None:
        write_whole(json_file, json.dumps(found.to_json(), indent=2) + "\n")
        logger.info("written to %s", json_file)
    return found


def parse_rows(words: list[str]) -> dict[str, int]:
    """Read TABLE=NUMBER from each word.

    Raises:
        ValueError: a word is not of this form.
    """
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            found[name] = int(float(number.replace("_", "")))
        except ValueError as error:
            raise ValueError(
                f"rows: '{word}' is not TABLE=NUMBER; write for instance item=4000000000"
            ) from error
    return found
