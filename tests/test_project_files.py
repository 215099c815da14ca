"""Files of the project itself: workflows, templates, version, and what stands at the top level."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import recsys

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOLDERS = {"recsys", "embeddings", "launch", "tests", "benchmarks", ".ci", ".github"}
LARGEST = 32 * 1024  # bytes of a file at the top level


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def made(workflow: Path) -> list[str]:
    """The make targets of a workflow, whose other steps use actions."""
    commands = [shlex.split(step["run"]) for step in steps(workflow) if "run" in step]
    assert all(command[0] == "make" and len(command) == 2 for command in commands), commands
    return [target for _, target in commands]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_targets_that_exist(workflow: Path) -> None:
    targets = made(workflow)
    assert targets and {*targets} <= TARGETS
    assert [step for step in steps(workflow) if not {"run", "uses"} & step.keys()] == []


def test_workflows_run_every_part_of_the_continuous_integration() -> None:
    calls = re.findall(r"run_part (.+)", (ROOT / ".ci" / "run").read_text())
    targets = [token for call in calls for token in call.split() if not token.startswith("--")]
    called = {target for workflow in WORKFLOWS for target in made(workflow)}
    # test-long has the wheel's test, and coverage those of test.
    missing = {"coverage", "wheel", "test-lowest", "links"}  # the last needs the network
    assert {*targets} - {"install-dev"} == called - missing


def test_workflows_test_every_python_that_the_project_names() -> None:
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = ci["jobs"]["test"]["strategy"]["matrix"]["python"]
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert versions == declared


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_for_issues_has_what_the_site_requires(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["attributes"]["label"] for field in form["body"])


def test_hooks_before_a_commit_run_programs_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in hooks:
        _, _, module, *_ = hook["entry"].split()
        assert f"-m {module}" in lint


def test_the_newest_section_of_the_changelog_is_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(recsys.__version__)} \(\d{{4}}-\d\d-\d\d\)", released[0])
    assert headings[1:] == released[1:] or headings == released


def test_the_top_level_has_the_folders_of_the_tower_and_small_files() -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no clone: what is tracked is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = {name.split("/")[0] for name in listed.stdout.splitlines()}
    files = {name for name in names if not (ROOT / name).is_dir()}
    assert names - files <= FOLDERS
    assert {name for name in files if (ROOT / name).stat().st_size > LARGEST} == set()
