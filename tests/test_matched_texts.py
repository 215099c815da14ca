"""Tests of errors and printed texts name settings, columns, files and values, not sentences.

An editor may then improve a sentence without a change of any test, and a test that fails means
that the cause is no longer named.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Four lower-case words in a row; parts of names, paths and quoted values are no words.
SENTENCE = re.compile(r"(?<![\w.\-/'\"<\\])[a-z]+(?:,? [a-z]+){3,}(?![\w.\-/'\"(>=])")
COMPARING = ("startswith", "endswith", "search", "match", "fullmatch")


def test_no_text_that_is_matched_holds_four_words_in_a_row() -> None:
    sentences = [
        f"{file.relative_to(TESTS)}:{node.lineno}: {node.value}"
        for file in sorted(TESTS.rglob("*.py"))
        for node in matched_strings(ast.parse(file.read_text()))
        if SENTENCE.search(node.value)
    ]
    assert sentences == []


@pytest.mark.parametrize(
    ("source", "is_sentence"),
    [
        ("raises(E, match='the table is absent')", True),
        ("raises(E, match=f'{file}: no such file there')", True),
        ("raises(E, match=r\"table 'item'.* is 3; .*num_embeddings\")", False),
        ("for told in ['a b c d']: raises(E, match=told)", True),
        ("told = 'a b c d'\nraises(E, match=told)", True),
        (
            "@mark.parametrize(('a', 'b'), [(1, 'a b c d')])\ndef t(b): raises(E, match=b)",
            True,
        ),
        (
            "@mark.parametrize(('a', 'b'), [('e f g h', 1)])\ndef t(b): raises(E, match=b)",
            False,
        ),
        (
            "CASES = [(1, 'a b c d')]\n@mark.parametrize('a,b', CASES)\ndef t(b): r(match=b)",
            True,
        ),
        ("assert 'a b c d' in text", True),
        ("assert text.startswith('a b c d')", True),
        ("assert text == 'a b c d'", False),
        ("BadInput(spoil, ['a b c d'])", True),
    ],
)
def test_sentences_are_seen_wherever_a_match_takes_them_from(
    source: str, is_sentence: bool
) -> None:
    seen = matched_strings(ast.parse(source))
    assert any(SENTENCE.search(node.value) for node in seen) == is_sentence


def matched_strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yields the strings that tests of a file look for in errors and in printed texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "match":
            yield from strings_of(node.value)
            for name in ast.walk(node.value):
                if isinstance(name, ast.Name):
                    for value in values_of(name.id, tree):
                        yield from strings_of(value)
        elif isinstance(node, ast.Assert):
            yield from strings_compared(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "BadInput":
            yield from strings_of(node.args[1])


def strings_of(node: ast.AST) -> Iterator[ast.Constant]:
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each


def strings_compared(node: ast.Assert) -> Iterator[ast.Constant]:
    """Yields what an assert seeks inside a text."""
    for each in ast.walk(node.test):
        if isinstance(each, ast.Compare) and isinstance(each.ops[0], ast.In | ast.NotIn):
            yield from strings_of(each.left)
        if isinstance(each, ast.Call) and ast.unparse(each.func).endswith(COMPARING):
            for argument in each.args:
                yield from strings_of(argument)


def values_of(name: str, tree: ast.Module) -> Iterator[ast.AST]:
    """Yields what a name may stand for: values assigned, looped over or given by parametrize."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(name in names_of(target) for target in targets):
                yield node.value
        elif isinstance(node, ast.For) and name in names_of(node.target):
            yield from column_of(names_of(node.target).index(name), node.iter, tree)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize"):
            names = " ".join(each.value for each in strings_of(node.args[0])).replace(",", " ")
            if name in names.split():
                yield from column_of(names.split().index(name), node.args[1], tree)


def names_of(target: ast.AST) -> list[str]:
    return [each.id for each in ast.walk(target) if isinstance(each, ast.Name)]


def column_of(index: int, rows: ast.AST, tree: ast.Module) -> Iterator[ast.AST]:
    """Yields one column of rows that are written out, here or under a name of the file."""
    if isinstance(rows, ast.Name):
        for value in values_of(rows.id, tree):
            yield from column_of(index, value, tree)
    elif isinstance(rows, ast.BinOp):
        yield from column_of(index, rows.left, tree)
        yield from column_of(index, rows.right, tree)
    elif isinstance(rows, ast.ListComp):
        yield from column_of(index, rows.generators[0].iter, tree)
    elif isinstance(rows, ast.List | ast.Tuple | ast.Dict):
        for row in rows.values if isinstance(rows, ast.Dict) else rows.elts:
            cells = row.elts if isinstance(row, ast.Tuple) else [row]
            yield cells[min(index, len(cells) - 1)]
