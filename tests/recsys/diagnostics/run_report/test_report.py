"""The page of a run, and what it says of items."""

import base64
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from recsys.checkpoint.partitions import ContinualFolder, RunState, TrainedPartition
from recsys.cli import main
from recsys.data.item_frequency import ItemCounts
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.diagnostics.run_report import quality
from recsys.diagnostics.run_report.command import summary
from recsys.diagnostics.run_report.page import Section, Table, html_page
from recsys.diagnostics.run_report.projector import (
    _write_embeddings,
    categories,
    category_column,
    check_folder,
    column_values,
    item_names,
    item_pictures,
    write_projector,
)
from recsys.diagnostics.run_report.quality import (
    metrics_by_count,
    prequential,
    read_curves,
    selection_curve,
)
from recsys.evaluation.metrics import ScoredRows
from recsys.evaluation.scores import SplitScores
from recsys.storage.location import Location
from tests.datasets import png, write_parquet
from tests.recsys.command_runs import TrainedRun

FIGURES = ["learning-curves", "quality-by-popularity"]
VECTORS = ["ID", "content", "ID_after_CIC", "content_after_CIC"]


class Page(HTMLParser):
    """What a browser would show and fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.descriptions: list[str | None] = []
        self.titles: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        attributes = dict(attrs)
        if tag == "figure":
            self.descriptions.append(attributes["id"])
        self.addresses += [attributes[name] or "" for name in ("src", "href") if name in attributes]

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)
        if self.open[-1:] == ["td"]:
            self.cells.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def data(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the tiny run, with titles and genres of items, and exchanged test labels."""
    data = shutil.copytree(trained.data, tmp_path_factory.mktemp("report") / "data")
    items = pq.read_table(data / "items")
    ids = items["item"].to_pylist()
    titles = [f"<script>no {item}</script>" if item % 3 else None for item in ids]
    genres = [f"$_{item % 2}$|rest" if item else None for item in ids]
    items = items.append_column("title", pa.array(titles))
    pq.write_table(items.append_column("genres", pa.array(genres)), data / "items/part-0.parquet")
    for file in (data / "test").glob("*.parquet"):
        rows = pq.read_table(file)
        index, unlike = rows.column_names.index("liked"), pc.subtract(1, rows["liked"])
        pq.write_table(rows.set_column(index, "liked", unlike), file)
    return data


@pytest.fixture(scope="module")
def report(data: Path, trained: TrainedRun) -> Path:
    """The page of the tiny run, trained over two ranks."""
    out = data.parent / "page.html"
    argv = ["--run", str(trained.run), "--data", str(data), "--out", str(out)]
    assert main(["report", *argv, "--device", "cpu"]) == 0
    return out


def test_the_page_has_every_figure_and_fetches_nothing(report: Path) -> None:
    page = Page(report.read_text())

    assert page.descriptions == FIGURES
    assert page.titles == [
        "Verdict",
        "Test metrics",
        "Learning curves",
        "Quality by item popularity",
        "Item vectors",
        "Configuration",
    ]
    assert page.cells[:7][0] == "all" and page.cells[:7][-1] == "23"
    drawings = [address for address in page.addresses if address.startswith("data:image/svg")]
    assert len(drawings) == len(FIGURES) == len(page.addresses) - 1
    for address in drawings:
        drawing = base64.b64decode(address.split(",")[1]).decode()
        assert drawing.rstrip().endswith("</svg>")
        questions = re.findall(r">[A-Z][^<>]*\?</text>", drawing)
        assert len(questions) == len(re.findall(r'id="axes_\d', drawing)) > 0
        assert 'href="http' not in drawing and "url(http" not in drawing


def test_the_metrics_are_those_of_the_data_of_the_page(trained: TrainedRun, report: Path) -> None:
    auc = json.loads((trained.run / "metrics.json").read_text())["test"]["auc"]
    assert auc != 0.5
    cells = Page(report.read_text()).cells
    assert cells[cells.index("all") + 1] == f"{1 - auc:.4f}"  # the labels are exchanged


def test_the_projector_has_vectors_and_names_of_items(report: Path) -> None:
    folder = report.with_name("page_projector")
    config = (folder / "projector_config.pbtxt").read_text()
    assert re.findall('tensor_name: "(.*?):', config) == VECTORS
    assert f"tensorboard --logdir {folder}" in report.read_text()
    header, *rows = [
        line.split("\t")
        for line in (folder / "00000/content/metadata.tsv").read_text().splitlines()
    ]
    assert header == ["name", "impressions", "genres"]
    assert rows[0][0] == "green red" and any(row[0].startswith("<script>no ") for row in rows)
    counts = [int(row[1]) for row in rows]
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    assert {row[2] for row in rows} <= {"$_0$", "$_1$", ""}
    vectors = np.loadtxt(folder / "00000/content/tensors.tsv")
    assert len(vectors) == len(rows)


def test_what_is_no_projector_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    check_folder(tmp_path / "new")
    with pytest.raises(ValueError, match="mine: "):
        check_folder(tmp_path / "mine")


def test_titles_and_cells_are_escaped() -> None:
    tables = [Table(["<i>"], [["<script>"]])]
    text = html_page("<b>", [Section("a & b", tables=tables)])

    assert "<b>" not in text and "<i>" not in text and "<script>" not in text
    assert "a &amp; b" in text


def test_rows_are_put_into_ranges_by_the_count_of_their_item() -> None:
    counts = np.array([0, 0, 1, 4, 5, 19, 20, 99, 100, 5000])
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 1, 1, 0])
    logits = np.array([2.0, 1, 0, 1, 1, 1, 3, 4, 5, 6])
    rows = ScoredRows(labels, logits, np.zeros(10, int))

    metrics = metrics_by_count(rows, counts)

    assert list(metrics) == ["0", "1–4", "5–19", "20–99", "100+"]
    assert [values["auc"] for values in metrics.values()] == [1.0, 0.0, 0.5, None, 0.0]
    assert [values["num_samples"] for values in metrics.values()] == [2] * 5


def test_the_best_model_is_that_of_the_first_highest_point_of_what_chose_it(tmp_path: Path) -> None:
    validations = ((10, 0.5, 0.5), (20, 0.75, 0.5), (30, 0.75, 0.5), (40, 0.625, 0.75))
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, auc, gauc in validations:
            writer.add_scalar("valid/auc", auc, step)
            writer.add_scalar("valid/gauc", gauc, step)

    curves = read_curves(tmp_path)

    steps = [10, 20, 30, 40]
    assert curves["valid/auc"] == (steps, [0.5, 0.75, 0.75, 0.625])
    assert selection_curve(curves, "auc") == curves["valid/auc"]
    assert selection_curve(curves, "auc_and_gauc") == (steps, [0.5, 0.625, 0.625, 0.6875])
    assert selection_curve({}, "auc") == ([], [])
    assert "step 20: 0.7500" in quality.learning_curves(tmp_path, "auc").paragraphs[0]
    assert "AUC and GAUC" in quality.learning_curves(tmp_path, "auc_and_gauc").paragraphs[0]
    assert "step 40: 0.6875" in quality.learning_curves(tmp_path, "auc_and_gauc").paragraphs[0]
    assert "step 30: 0.7500" in quality.learning_curves(tmp_path, "auc", 30).paragraphs[0]
    for step in (40, 50):  # the run's own model is of a step that these events do not name best
        assert "highest" not in quality.learning_curves(tmp_path, "auc", step).paragraphs[0]


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([0.5, 0.75], "2 validation(s) cannot show"),
        ([0.5, 0.625, 0.75], "The last of 3 validations is the best one"),
        ([0.5, 0.75, 0.625], "after step 2 of 3"),
    ],
)
def test_two_points_are_no_trend(tmp_path: Path, scores: list[float], verdict: str) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, score in enumerate(scores, 1):
            writer.add_scalar("valid/auc", score, step)
    section = quality.learning_curves(tmp_path, "auc")
    assert len(section.verdicts) == 1 and verdict in section.verdicts[0]
    svg = section.drawings[0].svg.decode()
    assert "Does the model still improve in validation?" in svg
    line = f"stroke: {quality.BLUE}; stroke-width"
    # The line of the curve, beside that of its sample in the legend.
    assert svg.count(f"fill: none; {line}") == (2 if len(scores) > 2 else 0)


def rows_of_users(number: int) -> SplitScores:
    """Three positives and three negatives of each user, on items of 30 impressions."""
    rng = np.random.default_rng(0)
    users, labels = np.repeat(np.arange(number), 6), np.tile([0, 1, 0, 1, 0, 1], number)
    logits = labels + rng.normal(size=len(labels))
    rows, columns = np.arange(len(labels)), (labels[:, None], logits[:, None])
    return SplitScores(rows, users, rows, np.full(len(labels), 30), *columns, ("liked",))


def test_what_cannot_be_drawn_is_said_in_words(tmp_path: Path) -> None:
    empty = quality.learning_curves(tmp_path, "auc")
    assert empty.drawings == [] and "tracker" in empty.paragraphs[0]

    rows = replace(rows_of_users(8), labels=np.ones((48, 1)))
    section = quality.item_popularity(rows, "test", has_probabilities=True)
    assert section.drawings == [] and any("one label" in text for text in section.paragraphs)


def test_every_label_has_a_table_and_a_softmax_loss_no_probabilities() -> None:
    values = dict.fromkeys(("auc", "gauc", "logloss", "ne", "calibration"), 0.5)
    metrics = values | {"num_samples": 3}
    report = metrics | dict.fromkeys(("warm", "cold", "unseen"), metrics)
    labels = {"labels": {"liked": report, "hated": report}}

    section = summary({"test": report | labels}, has_probabilities=True)
    assert [table.head[0] for table in section.tables] == ["liked", "hated"]
    assert "log loss" in section.tables[0].head

    section = summary({"test": report}, has_probabilities=False)
    (table,) = section.tables
    assert list(table.head) == ["items", "AUC", "GAUC", "rows"]
    assert table.rows[0] == ("all", "0.5000", "0.5000", "3")
    assert not any("og loss" in text or "robabilit" in text for text in section.verdicts)
    (table,) = quality.item_popularity(rows_of_users(8), "test", has_probabilities=False).tables
    assert list(table.head) == ["training impressions", "AUC", "GAUC", "rows"]


def test_a_difference_that_rests_on_few_users_says_so() -> None:
    values = dict.fromkeys(("auc", "gauc", "logloss", "ne", "calibration"), 0.5)
    metrics = values | {"num_samples": 90, "gauc_users": 20}
    report = metrics | dict.fromkeys(("warm", "cold"), metrics)
    for num_users, says_so in ((3, True), (5, False)):
        unseen = {"unseen": metrics | {"gauc_users": num_users}}
        section = summary({"test": report | unseen}, has_probabilities=True)
        assert any("rests on 3 users alone" in text for text in section.verdicts) == says_so


SCHEMA = """
target_item: item
group: user
columns:
  user: {kind: id, num_embeddings: 2}
  item: {kind: id, num_embeddings: 100}
  liked: {kind: label}
items:
  id: item
  columns:
    text: {kind: text}
    poster: {kind: image}
"""


def items_of(folder: Path, *files: dict[str, pa.Array], row_group_size: int = 2) -> ItemTable:
    """Items in as many files."""
    (folder / "schema.yaml").write_text(SCHEMA)
    for number, columns in enumerate(files):
        write_parquet(folder / f"items/part-{number}.parquet", pa.table(columns), row_group_size)
    root = Location.of(folder)
    return ItemTable(root, load_schema(root))


def test_values_are_those_of_the_items_whatever_file_and_row_group_they_lie_in(
    tmp_path: Path,
) -> None:
    first = {"item": pa.array([7, 3, 9, 1, 2]), "brand": pa.array(["g", "c", None, "a", "b"])}
    second = {"item": pa.array([50, 40]), "brand": pa.array(["y", "x"])}
    table = items_of(tmp_path, first, second)

    values = column_values(table, "brand", np.array([40, 2, 9, 7, 99, 2]))

    assert values == ["x", "b", None, "g", None, "b"]


def test_an_item_is_called_by_title_then_by_the_beginning_of_its_text_then_by_id(
    tmp_path: Path,
) -> None:
    table = items_of(
        tmp_path,
        {
            "item": pa.array([0, 1, 2, 3]),
            "title": pa.array(["Alien", None, " ", None]),
            "text": pa.array(["unused", "a  b\n" + 60 * "c", "short", None]),
        },
    )

    called = item_names(table, np.arange(5))

    assert called == ["Alien", "a b " + 55 * "c" + "…", "short", "item 3", "item 4"]
    assert item_names(None, np.array([3])) == ["item 3"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["Comedy|Drama", " War ", "", None]),
        pa.array([["Comedy", "Drama"], ["War"], [], None]),
        pa.array([[None, "Comedy"], ["War", None], [None], None]),
    ],
)
def test_the_first_of_several_categories_counts(tmp_path: Path, values: pa.Array) -> None:
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "genre": values})

    assert category_column(table.files, None) == "genre"
    assert categories(table, "genre", np.arange(4)) == ["Comedy", "War", None, None]


def test_a_category_named_as_a_column_of_the_projector_replaces_none(tmp_path: Path) -> None:
    columns = {"impressions": pa.array([70, 80]), "poster": pa.nulls(2, pa.binary())}
    table = items_of(tmp_path, {"item": pa.arange(0, 2), **columns})
    items, counts = np.arange(2), ItemCounts(np.arange(2), np.array([5, 3]))
    vectors = {"ID": torch.eye(2)}
    _write_embeddings(tmp_path / "projector", vectors, items, counts, table, "impressions")
    lines = (tmp_path / "projector/00000/ID/metadata.tsv").read_text().splitlines()
    assert lines == ["name\timpressions\titem's impressions", "item 0\t5\t70", "item 1\t3\t80"]


def test_all_ranks_look_up_the_rows_of_a_bounded_map(tmp_path: Path) -> None:
    """Rank 0 alone waited for the others without end."""
    np.save(tmp_path / "item_counts.npy", np.array([[4, 9], [1, 2]]))
    calls = list[list[int]]()

    def find(ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.tolist())
        return ids

    job: Any = SimpleNamespace(
        ranks=SimpleNamespace(is_first=False, raise_on_all_ranks=nullcontext),
        schema=SimpleNamespace(item_id_limit=None, num_items=5),
        vocabularies=SimpleNamespace(find_items=find),
        store=None,
    )
    assert write_projector(tmp_path / "projector", job, tmp_path, None, None) == 2
    assert calls == [[9, 4]] and not (tmp_path / "projector").exists()


def test_pictures_lie_on_white_squares(tmp_path: Path) -> None:
    tall = png(np.random.default_rng(0), width=100, height=400)
    posters = pa.array([[None, tall], [b"damaged"], [], None], pa.list_(pa.binary()))
    table = items_of(tmp_path, {"item": pa.arange(0, 4), "poster": posters})

    pictures = item_pictures(table, np.arange(4))

    assert pictures is not None and pictures.shape == (4, 3, 48, 48)
    assert (pictures[0] < 1).any(dim=0).nonzero()[:, 1].unique().tolist() == [*range(18, 30)]
    assert (pictures[1:] == 1).all()
    assert item_pictures(None, np.arange(2)) is None


def test_partitions_of_positive_rows_alone_have_no_figure(tmp_path: Path) -> None:
    undefined = dict.fromkeys(("auc", "gauc", "ne"))
    line = {"partition": "date=2026-11-01", "rows": 3, **undefined}
    line |= dict.fromkeys(("warm", "cold", "unseen"), undefined)
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    folder = ContinualFolder(tmp_path)
    folder.write(RunState((TrainedPartition("date=2026-11-01", 3, ""),)))
    section = prequential(tmp_path, has_probabilities=False)
    assert not section.drawings and section.tables[0].rows == [["date=2026-11-01", "–", "–", "3"]]
