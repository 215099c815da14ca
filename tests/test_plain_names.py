"""Names say what a value is: variables, arguments and fields are no function words.

`make lint` runs this file alone.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "embeddings", "launch", "benchmarks", "tests")
LARGEST_SHARE = 0.002
_TEXT = (
    "of found known each kept given wanted chosen done taken left meant asked told said such those "
    "these others here there now then both same own held passed named used made added needed "
    "written gone begun got seen more less"
)
FUNCTION_WORDS = frozenset(_TEXT.split())
FIRST_WORDS = {"of", "found", "known", "kept", "each"}
LAST_WORDS = {"of", "in", "at", "with", "by"}


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each target of an assignment, argument and annotated field, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def is_vague(name: str) -> bool:
    tokens = [token for token in name.lower().split("_") if token]
    if len(tokens) < 2:
        return bool(tokens) and tokens[0] in FUNCTION_WORDS
    return tokens[0] in FIRST_WORDS or tokens[-1] in LAST_WORDS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("of", True), ("_found", True), ("of_items", True), ("KEPT", True), ("sorted_by", True)),
        *(("num_items", False), ("_", False), ("by_item", False), ("foundation", False)),
    ],
)
def test_a_function_word_is_a_vague_name(name: str, expected: bool) -> None:
    assert is_vague(name) == expected


def test_almost_every_name_says_what_it_holds() -> None:
    total, vague = 0, Counter[str]()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for name, line in bound_names(ast.parse(file.read_text())):
                total += 1
                if is_vague(name):
                    vague[f"{file.relative_to(ROOT)}:{line}: {name}"] += 1
    assert vague.total() <= LARGEST_SHARE * total, "\n".join(vague)
