"""A command imports torch and the like only when it needs them, so that it answers at once."""

import subprocess
import sys
from pathlib import Path

from recsys.config.named_parts import find_part
from recsys.config.ranking import RANKING_MODELS, settings_class
from tests.recsys.command_runs import ROOT, TINY

# Runs the command lines, and names the slow packages that are imported after each of them.
PROGRAM = """
import contextlib, io, sys
from recsys.cli import main
for line in sys.argv[1:]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(line.split())
        except SystemExit as stopped:
            code = stopped.code
    slow = [name for name in ("torch", "torchrec", "transformers", "peft") if name in sys.modules]
    print(code, *slow)
"""


def test_help_and_errors_of_arguments_and_files_import_no_slow_package(tmp_path: Path) -> None:
    none = tmp_path / "none"
    train = f"train --config {TINY} --data {none} --out {none}/run"
    codes = {
        "--help": 0,
        "train --help": 0,
        "train --ranking.name sim --help": 0,
        "describe --help": 0,
        "prepare movielens --help": 0,
        "predict --help": 0,
        "no-such-command": 2,
        f"{train} --batchsize 3": 2,
        f"{train} --batch_size many": 2,
        f"{train} --batch_size 0": 1,
        f"{train} --content.dim 15": 1,
        f"train --config {none} --data {none} --out {none}/run": 2,
        train: 1,  # no such dataset
        f"evaluate --run {none}": 1,
        f"prepare movielens --source {none} --out {none}/data": 1,
        f"prepare vocabulary --data {none}": 1,
        f"prepare transforms --data {none}": 1,
        f"explain-data {none}": 1,
        f"compare --runs {none} {none}": 1,
    }
    words = [sys.executable, "-c", PROGRAM, *codes]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    outputs = dict(zip(codes, process.stdout.splitlines(), strict=True))
    assert outputs == {line: str(code) for line, code in codes.items()}


def test_the_settings_that_help_prints_are_those_of_the_models() -> None:
    for name in RANKING_MODELS:
        assert settings_class(name) is find_part("ranking.name", name, RANKING_MODELS).Settings
