"""Search spaces are read, checked and turned into command-line words."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from recsys.search.space import check_space, grid_of, read_space

PROJECT = Path(__file__).parents[3]
TINY = PROJECT / "recsys" / "recipes" / "tiny.yaml"
SPACE = """\
optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
content.fusion.num_queries: {low: 1, high: 3}
ranking.dropout: {low: 0.0, high: 0.2, step: 0.1}
ranking.mlp_units: {choices: [[8], [16, 8]]}
width:
  sets:
    recipe: {}
    wide: {content.dim: 32, embedding.dim: 32}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "space.yaml"
    file.write_text(text)
    return file


def test_ranges_choices_and_sets_are_read(tmp_path: Path) -> None:
    rate, queries, dropout, units, width = read_space(write(tmp_path, SPACE))

    assert rate.distribution == FloatDistribution(1e-4, 1e-2, log=True)
    assert queries.distribution == IntDistribution(1, 3)
    assert dropout.distribution == FloatDistribution(0.0, 0.2, step=0.1)
    assert units.distribution == CategoricalDistribution(["[8]", "[16, 8]"])
    assert units.settings("[16, 8]") == {"ranking.mlp_units": [16, 8]}
    assert width.settings("wide") == {"content.dim": 32, "embedding.dim": 32}
    assert width.settings("recipe") == {}


def test_a_grid_has_every_combination(tmp_path: Path) -> None:
    _, queries, dropout, *_ = read_space(write(tmp_path, SPACE))
    assert [
        value for combination in grid_of([queries, dropout]) for value in combination.values()
    ] == [
        *(1, 0.0, 1, 0.1, 1, 0.2),
        *(2, 0.0, 2, 0.1, 2, 0.2),
        *(3, 0.0, 3, 0.1, 3, 0.2),
    ]


def test_the_recipe_accepts_all_ends_and_choices(tmp_path: Path) -> None:
    check_space(read_space(write(tmp_path, SPACE)), TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ranking.dropout"),
        ("a: 3", "'a' is 3"),
        ("a: {low: 1, high: 2, most: 3}", "most"),
        ("a: {low: 2, high: 1}", "low=2.*high=1"),
        ("a: {low: x, high: 1}", "'x'"),
        ("a: {low: 0.0, high: 1.0, log: true}", "low.*0"),
        ("a: {low: 0.1, high: 1.0, log: yes please}", "'yes please'"),
        ("a: {choices: []}", r"\[\]"),
        ("a: {choices: [1, 1]}", r"\[1, 1\]"),
        ("a: {sets: {x: 3}}", "'x': 3"),
        ("a: {choices: [1]}\nb: {sets: {x: {a: 2}}}", "'a' and 'b' .* a;"),
        ("a: [", "space.yaml"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_space(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranking.dropuot: {choices: [0.1]}", "'ranking.dropuot' 0.1: .*dropout"),
        ("ranking.dropout: {low: 0.5, high: 1.5}", "'ranking.dropout' 1.5: .*ranking.dropout"),
    ],
)
def test_values_that_the_recipe_does_not_accept_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_space(read_space(write(tmp_path, text)), TINY)


def test_a_range_of_floats_has_no_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'optimizer.learning_rate'.*grid"):
        list(grid_of(read_space(write(tmp_path, SPACE))))
