"""Output of a benchmark: JSON lines, a Markdown table and a plot, with their provenance."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch

from benchmarks.timing.steps import Variant
from recsys.config import to_plain
from recsys.training.train import versions

matplotlib.use("Agg")  # writes files only, without a display
from matplotlib import pyplot
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PATH_OPTIONS = (
    "--out",
    "--results",
    "--data",
    "--cache",
    "--recipe",
    "--package",
    "--runs",
    "--recbole",
    "--run",
    "--before",
)
ABSOLUTE = re.compile(r"(?:^|(?<=[\s,'\"\[]))/[^\s,'\"\]}]*[^\s,'\"\]}/]")  # in lists and mappings
PIXELS = (1280, 720)
DPI = 100


@dataclass
class Result:
    """A benchmark's outcome.

    records: one JSON line each.
    rows: cells of the table, as texts.
    reading: sentences under the table.
    draw: fills the plot; None: the page has none.
    """

    name: str
    title: str
    records: list[dict[str, Any]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    draw: Callable[[Figure], None] | None = None
    reading: list[str] = field(default_factory=list)


def require_other_folder(quick: bool, folder: Path) -> None:
    """Require another folder for the figures of quick sizes.

    Raises:
        ValueError: figures of quick sizes would replace real ones.
    """
    if quick and folder == RESULTS:
        raise ValueError(
            f"--quick: its figures mean nothing and would replace those in {RESULTS}; give "
            "--results another folder"
        )


def write_result(result: Result, folder: Path) -> None:
    """Write `NAME.jsonl`, `.md`, ended by `NAME_notes.md`, and a plot on rank 0; print the page."""
    if os.environ.get("RANK", "0") != "0":
        return
    folder.mkdir(parents=True, exist_ok=True)
    metadata = provenance()
    lines = [json.dumps({**record, **metadata}) for record in result.records]
    (folder / f"{result.name}.jsonl").write_text(without_local_paths("\n".join(lines) + "\n"))
    notes = folder / f"{result.name}_notes.md"
    page = without_local_paths(_page(result, metadata, notes.read_text() if notes.exists() else ""))
    (folder / f"{result.name}.md").write_text(page)
    if result.draw is not None:
        figure = pyplot.figure(figsize=(PIXELS[0] / DPI, PIXELS[1] / DPI), layout="constrained")
        result.draw(figure)
        figure.suptitle(result.title)
        figure.savefig(folder / f"{result.name}.png", dpi=DPI)
        pyplot.close(figure)
    print(page)


def without_local_paths(text: str) -> str:
    """Replace this machine's folders by the names of their options, or relative paths."""
    tokens = [token for argument in sys.argv for token in argument.split("=", 1)]
    for option, value in itertools.pairwise(tokens):
        for folder in ABSOLUTE.findall(value) if option in PATH_OPTIONS else ():
            text = text.replace(folder, option.removeprefix("--").upper())
    return text.replace(f"{ROOT}/", "")


def provenance() -> dict[str, Any]:
    """Return machine, versions, commit, date and command."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions()},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "-uno", "--", ":!benchmarks/results")
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": match[1] if match else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _module() -> str:
    path = Path(sys.argv[0]).resolve()
    if not path.is_relative_to(ROOT / "benchmarks"):
        return path.name
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


def _git(*arguments: str) -> str | None:
    """Run git in the clone and return its output; None outside a clone."""
    process = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return process.stdout.strip() if process.returncode == 0 else None


def variant_record(variant: Variant) -> dict[str, Any]:
    """Describe a measured variant: names and the resolved configuration."""
    fields = asdict(variant)
    return {**fields, "configuration": to_plain(variant.config())}


def measured_on(metadata: dict[str, Any]) -> str:
    """Return the sentence of a page that names machine, versions, commit and date."""
    hardware = metadata["machine"]
    gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    changed = " with uncommitted changes" if metadata["uncommitted_changes"] else ""
    return (
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gb']} GB{gpus}; "
        f"{packages}; commit {metadata['commit']}{changed}; {metadata['date']}."
    )


def _page(result: Result, metadata: dict[str, Any], notes: str) -> str:
    lines = [
        f"# {result.title}",
        "",
        f"`{metadata['command']}`",
        "",
        measured_on(metadata),
        "",
        markdown_table(result.columns, result.rows),
        *(f"\n{sentence}" for sentence in result.reading),
        *([f"\n{notes.strip()}"] if notes else []),
        *([] if result.draw is None else ["", f"![{result.title}]({result.name}.png)"]),
    ]
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, the first column to the left, all others to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])
