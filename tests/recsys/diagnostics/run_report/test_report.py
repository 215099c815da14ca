"""The page of a run: every figure is in it, it fetches nothing, and its numbers are right."""

import base64
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from recsys.cli import main
from recsys.diagnostics.run_report.command import findings
from recsys.diagnostics.run_report.embedding_maps import (
    embedding_maps,
    pair_cosines,
    principal_plane,
)
from recsys.diagnostics.run_report.item_popularity import (
    BUCKETS,
    auc_error,
    metrics_by_count,
)
from recsys.diagnostics.run_report.item_vectors import ItemVectors
from recsys.diagnostics.run_report.learning_curves import (
    learning_curves,
    read_curves,
    selection_curve,
)
from recsys.diagnostics.run_report.page import Card, Cards, Section, Table, html_page
from recsys.evaluation.metrics import RankedRows
from tests.html_pages import Page, browser_dom
from tests.recsys.command_runs import TrainedRun

FIGURES = [
    "learning-curves",
    "quality-by-popularity",
    "cold-start",
    "embeddings",
    "contrastive-embeddings",
    "attention-layer-1",
]


@pytest.fixture(scope="module")
def data(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the tiny run, whose items here have titles and genres too."""
    data = shutil.copytree(trained.data, tmp_path_factory.mktemp("report") / "data")
    items = pq.read_table(data / "items")
    ids = items["item"].to_pylist()
    titles = [f"<script>no {item}</script>" if item % 3 else None for item in ids]
    genres = [f"$_{item % 2}$|rest" if item else None for item in ids]
    items = items.append_column("title", pa.array(titles))
    pq.write_table(items.append_column("genres", pa.array(genres)), data / "items/part-0.parquet")
    return data


@pytest.fixture(scope="module")
def report(data: Path, trained: TrainedRun) -> Path:
    """The page of the tiny run, trained over two ranks."""
    out = data.parent / "page.html"
    words = ["--run", str(trained.run), "--data", str(data), "--out", str(out)]
    assert main(["report", *words, "--device", "cpu"]) == 0
    return out


def test_the_page_has_every_figure_and_the_counted_rows(report: Path) -> None:
    page = Page(report.read_text())

    assert page.figures == FIGURES
    assert page.titles == [
        "Test metrics",
        "Learning curves",
        "Quality by item popularity",
        "Embedding maps",
        "Examples of nearest items",
        "Attention of the fusion",
        "Configuration",
    ]
    assert page.cells[:7][0] == "all" and page.cells[:7][-1] == "23"


def test_the_page_and_its_figures_fetch_nothing(report: Path) -> None:
    addresses = Page(report.read_text()).addresses
    drawings = [address for address in addresses if address.startswith("data:image/svg")]
    pictures = [address for address in addresses if address.startswith("data:image/jpeg")]

    assert len(drawings) == len(FIGURES) and pictures
    assert len(addresses) == 1 + len(drawings) + len(pictures)
    for address in drawings:
        drawing = base64.b64decode(address.split(",")[1]).decode()
        assert drawing.rstrip().endswith("</svg>")
        assert 'href="http' not in drawing and "url(http" not in drawing


def test_items_are_shown_by_title_or_text_with_all_markup_escaped(report: Path) -> None:
    text = report.read_text()

    assert "<script>" not in text
    assert "&lt;script&gt;no 1&lt;/script&gt;" in text
    assert "same genres" in text


def test_examples_of_unseen_items_have_neighbours_by_content_alone(report: Path) -> None:
    text = report.read_text()

    assert text.count('class="cards"') == 6
    assert text.count("nearest by content vector") == 6
    assert text.count("nearest by ID vector") == 4
    assert text.count("The ID vector is untrained") == 2
    assert text.count("cosine 0.") + text.count("cosine -0.") + text.count("cosine 1.") == 50


def test_the_legend_of_a_map_shows_any_text_as_it_is(report: Path) -> None:
    drawings = re.findall(
        r'id="(\S+)"><img alt="[^"]*" src="data:image/svg\+xml;base64,(.*?)"', report.read_text()
    )
    drawing = base64.b64decode(dict(drawings)["embeddings"]).decode()

    assert ">$_0$<" in drawing and ">$_1$<" in drawing
    assert "$|rest" not in drawing


def test_a_column_that_cannot_colour_the_maps_is_refused_before_anything_is_written(
    data: Path, trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "refused.html"
    words = ["report", "--run", str(trained.run), "--data", str(data), "--out", str(out)]

    for column, cause in (("brand", "is missing"), ("clip", "is of type list<")):
        assert main([*words, "--device", "cpu", "--colour_by", column]) == 1
        said = capsys.readouterr().err
        assert f"part-0.parquet: column '{column}' {cause}" in said
        assert "['item', 'text', 'title', 'genres']" in said
    assert not out.exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_a_browser_shows_every_figure_and_picture_within_1280_pixels(
    report: Path, tmp_path: Path
) -> None:
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.shown = "
        "[...document.querySelectorAll('figure')].filter(figure => { "
        "const image = figure.querySelector('img'); "
        "return image.complete && image.naturalWidth > 0 && image.width > 900 })"
        ".map(figure => figure.id).join(); "
        "const pictures = [...document.querySelectorAll('.card img')]; "
        "document.body.dataset.pictures = pictures.length > 0 && pictures.every(image => "
        "image.complete && image.naturalHeight > 0 && image.height === 96); "
        "document.body.dataset.fits = "
        "document.documentElement.scrollWidth <= innerWidth })</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(report.read_text().replace("</body>", script + "</body>"))
    shown = browser_dom(page)

    assert f'data-shown="{",".join(FIGURES)}"' in shown
    assert 'data-pictures="true"' in shown
    assert 'data-fits="true"' in shown


def test_titles_cells_and_cards_are_escaped() -> None:
    cards = Cards(Card("<b>", ["<i>"]), [("<script>", [Card("<b>", picture=b"jpeg")])])
    tables = [Table(["<i>"], [["<script>"]])]
    text = html_page("<b>", [Section("a & b", tables=tables, cards=[cards])])

    assert "<b>" not in text and "<i>" not in text and "<script>" not in text
    assert "a &amp; b" in text


def test_a_card_has_a_picture_or_a_field_for_it_or_neither() -> None:
    def shown(picture: bytes | None) -> str:
        cards = Cards(Card("name", picture=picture), [])
        return html_page("page", [Section("items", cards=[cards])])

    assert '<img alt="name" src="data:image/jpeg;base64,anBlZw==">' in shown(b"jpeg")
    assert 'class="blank"' in shown(b"") and "<img" not in shown(b"")
    assert 'class="blank"' not in shown(None) and "<img" not in shown(None)


def test_rows_are_put_into_ranges_by_the_count_of_their_item() -> None:
    counts = np.array([0, 0, 1, 4, 5, 19, 20, 99, 100, 5000])
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 1, 1, 0])
    logits = np.array([2.0, 1, 0, 1, 1, 1, 3, 4, 5, 6])
    rows = RankedRows(labels, logits, np.zeros(10, int))

    found = metrics_by_count(rows, counts, BUCKETS)

    assert list(found) == ["0", "1–4", "5–19", "20–99", "100+"]
    assert [of["auc"] for of in found.values()] == [1.0, 0.0, 0.5, None, 0.0]
    assert [of["num_samples"] for of in found.values()] == [2] * 5
    assert [of["positives"] for of in found.values()] == [1, 1, 1, 2, 1]


def test_the_error_of_an_auc_is_that_of_ranking_at_random() -> None:
    # Without skill its variance is that of the Mann-Whitney U, (n + m + 1) / (12 n m).
    assert auc_error(0.5, 10, 30) == pytest.approx(np.sqrt(41 / (12 * 10 * 30)))


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
    assert "step 20: 0.7500" in learning_curves(tmp_path, "auc").words[0]
    assert "AUC and GAUC" in learning_curves(tmp_path, "auc_and_gauc").words[0]
    assert "step 40: 0.6875" in learning_curves(tmp_path, "auc_and_gauc").words[0]
    assert "step 30: 0.7500" in learning_curves(tmp_path, "auc", 30).words[0]
    for step in (40, 50):  # the run's own model is of a step that these events do not name best
        assert "highest" not in learning_curves(tmp_path, "auc", step).words[0]


def test_findings_are_about_what_is_defined() -> None:
    known = {"ne": 0.8, "gauc": 0.75, "calibration": 1.3}
    nothing = {"ne": None, "gauc": None, "calibration": None}

    said = " ".join(findings({"all": known, "warm": known, "unseen": known | {"gauc": 0.5}}))

    assert "better by 20.0 %" in said and "+0.2500" in said and "too high" in said
    assert findings({"all": nothing, "warm": nothing, "unseen": nothing}) == []


def test_the_plane_holds_the_two_directions_that_vary_most() -> None:
    vectors = torch.tensor([[4.0, 0, 1], [-4.0, 0, 1], [0, 2.0, 1], [0, -2.0, 1]])

    plane, share = principal_plane(vectors)

    assert share == pytest.approx(1)
    torch.testing.assert_close(plane.abs(), vectors[:, :2].double().abs())


def test_cosines_are_of_one_item_and_of_two() -> None:
    ids = torch.tensor([[2.0, 0], [0, 1.0]])
    content = torch.tensor([[1.0, 0], [1.0, 1.0]])

    own, others = pair_cosines(ids, content)

    assert own == pytest.approx((1 + 0.5**0.5) / 2)
    assert others == pytest.approx(0.5**0.5 / 2)


def test_a_model_of_ids_alone_has_one_map_and_says_why() -> None:
    section = embedding_maps(ItemVectors(np.arange(5), torch.randn(5, 4)), np.ones(5, int))

    assert [drawing.name for drawing in section.drawings] == ["embeddings"]
    assert "content branch" in section.words[0]
