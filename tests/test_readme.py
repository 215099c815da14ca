"""Every command of the README and of the pages in the folders runs, in one folder.

A `recsys` command that stands on several pages runs once. Exchanged are: `make` and the installer,
which the continuous integration runs for real, by dry runs, the recipe with a pretrained encoder by
`tiny.yaml` in large batches with a frozen encoder, histories of 200 items by those of 20, two
epochs and more of the pages' shop by one, three trials of a search by one, the log of IFDB by that
of an eighth of its users, torchrun by ranks of `run_recsys` (but on the launcher's own page),
torchx, too, but for training and benchmarks, and benchmarks by sizes of seconds.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.distributed.watchdog import Heartbeat, silent_ranks, stalled_ranks
from recsys.evaluation.bootstrap import interval_stretch
from tests.ranks import HANG_SECONDS
from tests.recsys.command_runs import run_recsys
from tests.recsys.commands.hub_server import Hub

PROJECT = Path(__file__).parent.parent
# In the order in which a reader meets them: later commands use what earlier ones wrote.
PAGES = (
    "README.md",
    "recsys/README.md",
    "recsys/data/README.md",
    "recsys/data/events/README.md",
    "recsys/data/transforms/README.md",
    "recsys/diagnostics/README.md",
    "recsys/config/README.md",
    "recsys/content/README.md",
    "recsys/kernels/README.md",
    "recsys/ranking/README.md",
    "recsys/training/README.md",
    "recsys/search/README.md",
    "recsys/plug_in/README.md",
    "benchmarks/README.md",
    "launch/README.md",
    "launch/gpu/README.md",
    "recsys/checkpoint/README.md",
    "recsys/evaluation/README.md",
    "recsys/training/continual/README.md",
    "recsys/serving/README.md",
    "recsys/serving/server/README.md",
    "recsys/serving/retrieval/README.md",
    "launch/docs/tutorial.md",
    "launch/docs/concepts.md",
    "launch/docs/glossary.md",
)
PRINTED = (PROJECT / "benchmarks" / "results" / "printed.md").read_text()
LONGEST_LINE = 110  # of code that a page shows on a screen of 1280 pixels, without scrolling
LINES_OF_TWO_SCREENS = 60
FRONT_PAGE = (PROJECT / "README.md").read_text()
TUTORIAL = (PROJECT / "launch" / "docs" / "tutorial.md").read_text()
README = "\n".join((PROJECT / page).read_text() for page in PAGES)
# A data set that may not be copied here; where it is absent, its commands are left out.
IFDB = Path(os.environ.get("RECSYS_IFDB", PROJECT.parent / "shared" / "ifdb"))
# tiny.yaml with large batches and its encoder frozen, for datasets of people.
FEW_STEPS = "few_steps.yaml"
EXCHANGED = (
    (r"^make (\w.*)$", r"make -n \1"),
    (r"^python3 (launch/install\.py .*)$", rf"{sys.executable} \1 --help"),
    (r"^\.venv/bin/python -m pytest -n 2 .*$", f"{sys.executable} -m pytest --version"),
    (r"^\.venv/bin/", ""),
    (r"--history-length 200", "--history-length 20"),
    (r"--config movielens_sample", f"--config {FEW_STEPS}"),
    (r"--trials 3 ", "--trials 1 "),
    (r"(--config titles\.yaml)", r"\1 --epochs 1 --batch-size 2048"),
    (r"^recsys (push|pull) ", r"python -m recsys.cli \1 "),  # a process that reads HF_ENDPOINT
    (r"^(.* train --config (?:shop|media)\.yaml (?!.*--(?:epochs|dry-run)).*)$", r"\1 --epochs 1"),
    (r"^torchrun --nproc-per-node 2 -m -- recsys\.cli (?!.*runs/torchrun)", "recsys --ranks 2 "),
    (
        r"^torchx run -s local_cwd launch/components\.py:(cache|predict|evaluate) --nproc (\d) --",
        r"recsys --ranks \2 \1",
    ),
    (r"^torchrun --nproc-per-node 2 dlrm\.py$", "recsys --ranks 2 dlrm.py"),
    (r"--source IFDB", "--source few_of_ifdb"),
    (
        r"--config ifdb (.*)",
        rf"--config {FEW_STEPS} \1 --content.modalities.text.column tags",
    ),
    (
        r"(--grid ifdb .*) --recipe \S+ --seeds 1 --jobs 2 --only .*$",
        rf"\1 --recipe {FEW_STEPS} --seeds 1 --only '[ID only]'",
    ),
    (r"^recsys serve (.*)$", r"timeout 300 recsys serve \1 --grpc_port 0 >serve.log 2>&1 &"),
    (
        r"^(python -m benchmarks speed \w+|torchx .*:benchmark) (.*)$",
        r"\1 \2 --quick true --results figures",
    ),
    (r"^(python -m benchmarks speed compare .*)$", r"\1 --only '[ID only, bank_lora]'"),
    (
        r"^(python -m benchmarks quality parts --grid backbones) --data \S+ (.*)$",
        r"\1 --data shop --recipe shop.yaml --seeds 1 --only [din] \2",
    ),
)


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language; without one, they show what commands print."""
    fences = re.findall(r"^```(.*?)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for fence, block in fences if fence == language]


def lines_not_in(output: str, block: str) -> list[str]:
    """The lines of a block that no line of an output equals; `...` stands for any text."""
    lines = {" ".join(line.split()) for line in output.splitlines()}
    patterns = {
        line: re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        for line in block.splitlines()
    }
    return [
        line
        for line, pattern in patterns.items()
        if not any(re.fullmatch(pattern, printed_line) for printed_line in lines)
    ]


def run_script(code: str, folder: Path) -> None:
    """Runs Python code without an error, in a process that has imported the libraries."""
    (folder / "script.py").write_text(code)
    run("recsys script.py", folder)


def run(command: str, folder: Path) -> str:
    """Runs a command without an error and returns what it printed."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    if "--kernels native" in command:  # compiled once on this machine, as `make train` does
        del environment["XDG_CACHE_HOME"]
    else:
        environment["CXX"] = "no-compiler"  # so `recsys export` does not compile for a minute
    if command.startswith("recsys "):
        argv, ranks = shlex.split(command)[1:], 1
        if argv[0] == "--ranks":
            ranks, argv = int(argv[1]), argv[2:]
        process = run_recsys(*argv, ranks=ranks, folder=folder, environment=environment)
    else:
        process = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
    assert process.returncode == 0, f"{command}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    return process.stdout


def write_few_users(source: Path, folder: Path) -> None:
    """Write a copy of a log with one of eight users."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    events = pq.read_table(source / "events.parquet")
    users = pc.unique(events["user"])[::8]
    pq.write_table(events.filter(pc.is_in(events["user"], users)), folder / "events.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a reader of the README would be: beside the sources, with a Hub on this machine."""
    root = tmp_path_factory.mktemp("readme")
    sources = ("launch", "recsys", "embeddings", "tests")
    for name in ("Makefile", "pyproject.toml", "README.md", *sources):
        (root / name).symlink_to(PROJECT / name)
    (root / "shop.yaml").write_text(blocks("yaml")[0])
    events = next(block for block in blocks("yaml") if "histories:" in block)
    (root / "events.yaml").write_text(events)
    media = next(block for block in blocks("yaml") if "pictures" in block)
    (root / "media.yaml").write_text(media)
    space = next(block for block in blocks("yaml") if "sets:" in block)
    (root / "space.yaml").write_text(space)
    tiny = (PROJECT / "recsys" / "recipes" / "tiny.yaml").read_text()
    few_steps = tiny.replace("batch_size: 256", "batch_size: 2048")
    (root / FEW_STEPS).write_text(few_steps.replace("training: lora", "training: frozen"))
    (root / "visits.yaml").write_text(blocks("yaml", TUTORIAL)[0])
    (root / "titles.yaml").write_text(blocks("yaml", TUTORIAL)[1])
    own_model = next(block for block in blocks("python") if "class TargetProducts" in block)
    (root / "my_ranking.py").write_text(own_model)
    if IFDB.exists():
        write_few_users(IFDB, root / "few_of_ifdb")
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", "hf_of_the_stand_in")
        yield root
    hub.shutdown()
    hub.server_close()


@pytest.mark.long
def test_every_command_of_the_readme_runs(folder: Path) -> None:
    scripts = blocks("python")
    for script in scripts:
        if "packages/" not in script:  # else it reads what a command writes
            run_script(script, folder)
    text = "\n".join(blocks("bash")).replace("\\\n", "")
    commands = [" ".join(line.split()) for line in text.splitlines() if line]
    assert len(commands) > 12
    printed = {}
    for command in commands:
        if "data/ifdb" in command and not IFDB.exists():
            continue
        for pattern, replacement in EXCHANGED:
            command = re.sub(pattern, replacement, command)
        if command not in printed or not command.startswith("recsys "):
            printed[command] = run(command, folder)
    for script in scripts:
        if "packages/" in script:
            run_script(script, folder)
    plan = next(
        text for command, text in printed.items() if re.match("recsys describe.* --nodes", command)
    )
    assert lines_not_in(plan, next(block for block in blocks("") if "fits:" in block)) == []
    assert (folder / "predictions.parquet").is_file()
    assert (folder / "runs" / "movielens_sample" / "metrics.json").is_file()


def test_every_recipe_the_readme_names_exists_and_every_recipe_is_named() -> None:
    names = set(re.findall(r"`(\w+\.yaml)`", README)) - {
        "shop.yaml",
        "events.yaml",
        "visits.yaml",
        "titles.yaml",
        "media.yaml",
        "schema.yaml",
        "transforms.yaml",
        "space.yaml",
        "best.yaml",
        "recipe.yaml",
        "config.yaml",
        "content.yaml",
    }

    assert names == {path.name for path in (PROJECT / "recsys" / "recipes").glob("*.yaml")}


def test_recipes_in_the_readme_are_configurations(tmp_path: Path) -> None:
    recipes = [block for block in blocks("yaml") if "epochs:" in block]
    assert len(recipes) >= 2
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(recipe)
        load_config(tmp_path / "recipe.yaml")


def test_every_page_is_read_here() -> None:
    folders = ("recsys", "embeddings", "launch", "benchmarks")
    pages = {path for folder in folders for path in (PROJECT / folder).rglob("README.md")}
    site = {path for path in (PROJECT / "launch" / "docs").glob("*.md") if path.stem != "api"}
    assert {PROJECT / page for page in PAGES} == pages | site | {PROJECT / "README.md"}


def test_the_front_page_is_short_and_shows_its_command_and_result_first() -> None:
    lines = FRONT_PAGE.splitlines()
    assert len(lines) <= 160
    assert {"make train", *blocks("", FRONT_PAGE)[0].splitlines()} <= {*lines[:20]}


@pytest.mark.parametrize("page", PAGES)
def test_output_on_a_page_is_what_a_recorded_command_printed(page: str) -> None:
    """Blocks without a language show output, unless they show a class."""
    shown = [block for block in blocks("", (PROJECT / page).read_text()) if "class " not in block]
    beats = [Heartbeat(1, False, 10.0, 9 - rank, 5, "step 57", "") for rank in (0, 1)]
    behind, silent = stalled_ranks(dict(enumerate(beats)), 300), silent_ranks({1: beats[1]}, 300)
    sources = f"{PRINTED}\nrank 0: {silent}\nrank 0: {behind}"
    assert [line for block in shown for line in lines_not_in(sources, block)] == []


def test_a_figure_that_no_command_printed_is_seen() -> None:
    printed = "all  0.8752  0.7720\nfits: 37.6 GiB per rank are left"
    assert lines_not_in(printed, "all 0.8752   0.7720\n...\nfits: ...\n") == []
    assert lines_not_in(printed, "all 0.8752   0.7721\n") == ["all 0.8752   0.7721"]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_code_fit_a_screen(page: str) -> None:
    code = re.findall(r"^```.*?^```", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in code for line in block.splitlines()]
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {"launch/docs/glossary.md"}))
def test_an_example_or_a_picture_stands_on_the_first_two_screens(page: str) -> None:
    lines = (PROJECT / page).read_text().splitlines()
    assert any(line.startswith(("```", "![")) for line in lines[:LINES_OF_TWO_SCREENS])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (PROJECT / page).parent / file if file else PROJECT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            slugs = [
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            ]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_figures_in_the_text_of_a_page_are_those_of_the_results_that_it_links(page: str) -> None:
    """Or of a formula; numbers of two and more decimals, but no arXiv's nor (versions)."""
    text = re.sub(r"^```.*?^```", "", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]*results/\w+\.md)\)", text)
    sources = "".join(((PROJECT / page).parent / link).read_text() for link in links)
    text = re.sub(r"\(\d+\.\d+\)", "", text)
    sources += "".join(f" {interval_stretch(users):.2f}" for users in (5, 20, 300))
    numbers = re.findall(r"(?<![\w./-])(?!\d{4}\.\d{5})\d*(\.\d{2,})(?![\w.])", text)
    assert [number for number in numbers if number not in sources] == []


def test_figures_of_the_front_page_are_those_of_the_results() -> None:
    section = FRONT_PAGE.split("## What it wins\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    numbers = [number for row in rows for number in re.findall(r"(?<=\| )\d\.\d{4}", row)]
    names = (
        "quality_recipe_parts",
        "peers_neighbours",
        "quality_ifdb_side",
        "peers_ifdb_lightgbm_epochs",
        "peers_ifdb_legommenders",
        "peers_ifdb_din",
    )
    folder = PROJECT / "benchmarks" / "results"
    results = "".join((folder / f"{name}.md").read_text() for name in names)
    assert len(numbers) == 27
    assert [number for number in numbers if number not in results] == []
