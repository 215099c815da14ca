"""The page of branches for GPUs names every one in the sources, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "launch" / "gpu" / "README.md"
PACKAGES = ("recsys", "embeddings", "launch")
# How a branch is checked; the page explains each.
CHECKS = ("fake tensors", "simulated", "gloo", "read", "nothing")
# Attributes and names that only code for GPUs has.
NAMES = (
    *(
        "cuda",
        "is_cuda",
        "use_cpu",
        "nccl",
        "pin_memory",
        "is_pinned",
        "record_stream",
        "wait_stream",
        "is_on_host",
        "is_host",
    ),
    *("reset_cache_states", "DMPCollection", "DTensor", "PrefetchTrainPipelineSparseDist"),
)
DEVICES = ("cuda", "cpu", "nccl")
GPU_NAMES = re.compile(r"nccl|^cuda$|^cuda:|^uvm")


def branches(file: Path) -> Iterator[str]:
    """Yields the innermost function, class or `module` around each branch for GPUs."""
    yield from _branches(ast.parse(file.read_text()), "module")


def _branches(node: ast.AST, owner: str) -> Iterator[str]:
    if _is_branch(node):
        yield owner
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Subscript) and ast.unparse(child.value).endswith("Literal"):
            continue  # a type, not a branch
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        is_owner = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _branches(child, child.name if is_owner else owner)


def _is_branch(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name):
            return name in NAMES
        case ast.Compare(left=ast.Attribute(attr="type")) | ast.Compare(left=ast.Name()):
            texts = [leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)]
            return any(text in DEVICES for text in texts)
        case ast.Constant(value=str(text)):
            return GPU_NAMES.search(text) is not None
    return False


def found_in_sources() -> set[tuple[str, str]]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    hints = re.compile("|".join([*NAMES, *DEVICES, "uvm"]))
    return {
        (str(file.relative_to(ROOT)), owner)
        for file in files
        if hints.search(file.read_text())  # most files have none, and parsing takes time
        for owner in branches(file)
    }


def rows_of_page() -> list[tuple[str, str, str, str]]:
    pattern = re.compile(r"^\| `(\S+\.py)` \| `(\w+)` \| (.+) \| ([\w ]+) \|$", re.MULTILINE)
    return pattern.findall(PAGE.read_text())


def test_every_branch_has_one_row_and_every_row_a_branch() -> None:
    listed = [(file, owner) for file, owner, *_ in rows_of_page()]
    assert len(listed) == len(set(listed))
    branches = found_in_sources()
    missing, stale = branches - set(listed), set(listed) - branches
    assert not missing, f"add to launch/gpu/README.md, with what was checked: {sorted(missing)}"
    assert not stale, f"no branch any more, remove from launch/gpu/README.md: {sorted(stale)}"


def test_every_row_says_how_it_was_checked() -> None:
    assert {check for *_, check in rows_of_page()} <= set(CHECKS)
    explained = re.findall(r"^- \*\*(.+?)\*\*:", PAGE.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(CHECKS)


def test_tests_that_the_page_names_ask_for_gpus() -> None:
    listed = set(re.findall(r"`(tests/\S+\.py)`", PAGE.read_text()))
    assert len(listed) == 7
    for file in listed:
        text = (ROOT / file).read_text()
        assert "device: str" in text or "pytest.mark.gpu" in text, file
