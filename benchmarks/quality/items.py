"""Item vectors that runs of the study learned: sections of `recsys report` on one run each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.quality.grid import LOOKED_AT
from benchmarks.quality.study import CellResult
from recsys.diagnostics.run_report.command import item_sections
from recsys.diagnostics.run_report.item_columns import item_table
from recsys.diagnostics.run_report.item_descriptions import category_column
from recsys.diagnostics.run_report.page import Section
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import load_run


def sections_on_items(results: Sequence[CellResult], with_examples: bool) -> list[Section]:
    """Build the map of ID and content vectors, the fusion's attention and nearest items.

    One run per cell of `LOOKED_AT` that has results: the seed with the median validation AUC,
    on the last dataset.

    Args:
        results: results of the study.
        with_examples: show items with names and pictures, which are then in the page.

    Raises:
        ValueError: the run's model is missing, or its dataset cannot be read.
    """
    wanted = [result for result in results if result.cell.name in LOOKED_AT]
    if not wanted:
        return []
    with joined_ranks("cpu") as ranks:
        return [section for result in wanted for section in _sections(result, ranks, with_examples)]


def _sections(result: CellResult, ranks: Ranks, with_examples: bool) -> list[Section]:
    seed = result.median_seed()
    run = result.runs[seed][-1].folder
    if not (run / "checkpoints" / "best").exists():
        raise ValueError(
            f"{run}: the run of '{result.cell.name}' whose items are to be shown has no checkpoint "
            "any more; remove the folder, and the study trains it again, or leave the cell out "
            "with --only"
        )
    job = load_run(run, None, ranks, "cpu")
    table = item_table(job)
    category = category_column([] if table is None else table.files, None)
    test_items = result.scores[seed][-1].items
    sections = item_sections(job, run, test_items, table, category, with_examples)
    return [_named(section, result.cell.name) for section in sections]


def _named(section: Section, cell: str) -> Section:
    """Add the cell's name to titles and figures, to distinguish several runs on one page."""
    ending = cell.lower().replace(" ", "-").replace("+-", "")
    drawings = [replace(drawing, name=f"{drawing.name}-{ending}") for drawing in section.drawings]
    return replace(section, title=f"{section.title}: {cell}", drawings=drawings)
