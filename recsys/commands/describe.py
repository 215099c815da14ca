"""Runs `recsys describe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from embeddings.device_figures import DEVICES, FigureOverrides
from recsys.commands.options import add_data_option, require_schema
from recsys.config import add_config_arguments, config_from
from recsys.config.parser import Parser
from recsys.doctor import require_working_installation


def add_arguments(parser: Parser, words: Sequence[str]) -> None:
    """Add the settings of a run, and the cluster."""
    add_config_arguments(parser, words, skip=frozenset({"device"}))
    add_data_option(parser)
    add = parser.add_argument
    text = "a100, h100, h200 or b200, present or not; auto, cpu or cuda: as this machine"
    add("--device", type=str, default="auto", help=text)
    add("--nodes", type=int, default=1, help="machines")
    text = "ranks of each machine; default: the GPUs of this machine, or 1"
    add("--gpus-per-node", type=int | None, help=text)
    text = "TABLE=NUMBER: other numbers of rows than in schema.yaml"
    add("--rows", type=str, nargs="+", default=[], help=text)
    parser.add_class_arguments(FigureOverrides, "figures")
    add("--json", type=Path | None, help="file to write the numbers to")


def run(arguments: Namespace) -> None:
    """Print the description of the run."""
    device = arguments.device
    arguments.device = "cuda" if device in DEVICES else device
    config = config_from(arguments)
    require_schema(arguments.data)
    require_working_installation()
    from recsys.diagnostics.plan.command import describe_run

    cluster = device, arguments.nodes, arguments.gpus_per_node
    changed = arguments.rows, arguments.figures
    describe_run(config, arguments.data, *cluster, *changed, arguments.json)
