"""The layout of the code: rooms in a strict tower, small files and functions, visible collectives.

The rooms and their order stand in pyproject.toml as contracts of import-linter.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "embeddings", "launch", "benchmarks")
COUNTED = ("recsys", "embeddings", "launch")  # whose functions have a largest length
FILES_IN_ROOT = 6
LINES_OF_FILE, LINES_OF_FUNCTION = 500, 50
VAGUE_NAMES = ("utils", "helpers", "common")
COLLECTIVES = (
    *("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather"),
    *("monitored_barrier", "reduce", "scatter"),
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*packages: str) -> list[Path]:
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def body_length(function: Function) -> int:
    """Lines of a function without its signature and docstring, which commands may have long."""
    statements = function.body[ast.get_docstring(function) is not None :]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0  # type: ignore[operator]


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_no_import_runs_upward() -> None:
    # In a process of its own, as the command configures logging and so silences other loggers.
    command = Path(sys.executable).with_name("lint-imports")
    process = subprocess.run([command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True)
    assert process.returncode == 0, process.stdout.decode()


def test_no_modules_import_each_other_in_a_circle(imports: grimp.ImportGraph) -> None:
    graph = {name: imports.find_modules_directly_imported_by(name) for name in imports.modules}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the names of a circle


def test_no_room_imports_the_package_that_holds_all_rooms(imports: grimp.ImportGraph) -> None:
    importers = imports.find_modules_that_directly_import("recsys")
    assert [name for name in importers if name.startswith("recsys.")] == []


def test_the_root_of_recsys_holds_few_files() -> None:
    assert len(list((ROOT / "recsys").glob("*.py"))) <= FILES_IN_ROOT


def test_no_file_is_long() -> None:
    lines = {name_of(file): len(file.read_text().splitlines()) for file in python_files(*PACKAGES)}
    assert {name: count for name, count in lines.items() if count > LINES_OF_FILE} == {}


def test_no_function_is_long() -> None:
    lengths = {
        f"{name_of(file)}: {function.name}": body_length(function)
        for file in python_files(*COUNTED)
        for function, _ in functions_of(ast.parse(file.read_text()))
    }
    assert {name: count for name, count in lengths.items() if count > LINES_OF_FUNCTION} == {}


def test_every_file_is_named_for_what_it_does() -> None:
    assert [name_of(file) for file in python_files(*PACKAGES) if file.stem in VAGUE_NAMES] == []


def test_a_function_that_calls_a_collective_says_so() -> None:
    silent = [
        f"{name_of(file)}: {name}"
        for file in python_files(*COUNTED)
        for name in functions_with_silent_collectives(file.read_text())
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("body", "is_silent"),
    [
        ("dist.all_reduce(x)", True),
        ('"""Sums x over ranks. Collective."""\n    dist.all_reduce(x)', False),
        ("torch.distributed.all_gather_object(out, x)", True),
        ("all_to_all_single(out, x)", True),
        ("x.gather(0, y)", False),
        ('"""Returns a collective."""\n    def inner():\n        dist.barrier()', False),
    ],
)
def test_collectives_are_seen_by_the_names_that_torch_gives_them(
    body: str, is_silent: bool
) -> None:
    source = (
        "import torch\n"
        "import torch.distributed as dist\n"
        "from torch.distributed.nn.functional import all_to_all_single\n"
        f"def work(x, y, out):\n    {body}\n"
    )
    assert (functions_with_silent_collectives(source) != []) == is_silent


def functions_of(
    node: ast.AST, around: tuple[Function | ast.ClassDef, ...] = ()
) -> Iterator[tuple[Function, tuple[Function | ast.ClassDef, ...]]]:
    """Yields each function with the functions and classes that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, around
        inside = (*around, child) if isinstance(child, Function | ast.ClassDef) else around
        yield from functions_of(child, inside)


def functions_with_silent_collectives(source: str) -> list[str]:
    """Names the functions that call a collective where no docstring around the call says so."""
    tree = ast.parse(source)
    modules, imported = names_of_distributed(tree)
    return [
        function.name
        for function, around in functions_of(tree)
        if any(is_collective(call, modules, imported) for call in direct_calls(function))
        and not any(
            "collective" in (ast.get_docstring(node) or "").lower()
            for node in (*around, function)
            # What a class says holds for making it, and not for its other methods.
            if isinstance(node, Function) or function.name == "__init__"
        )
    ]


def names_of_distributed(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Returns the names of `torch.distributed` in a file, and of what is imported from it."""
    modules, imported = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname
                for alias in node.names
                if alias.asname and alias.name.startswith("torch.distributed")
            }
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            imported |= {alias.asname or alias.name for alias in node.names}
    return modules, imported


def direct_calls(function: Function) -> Iterator[ast.Call]:
    """Yields the calls in a function's body, without those in functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, Function):
            waiting += ast.iter_child_nodes(node)


def is_collective(call: ast.Call, modules: set[str], imported: set[str]) -> bool:
    if isinstance(call.func, ast.Attribute):
        is_of_torch, name = ast.unparse(call.func.value) in modules, call.func.attr
    else:
        name = ast.unparse(call.func)
        is_of_torch = name in imported
    return is_of_torch and name.startswith(COLLECTIVES)
