"""Progress that a training shows, and dry runs."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.distributed.log import configure_logging, progress_bar
from recsys.training.dry_run import DryRun, dry_run
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import train_argv
from tests.recsys.em3_runs import em3_config, ranks_of

SHORT = ["--epochs", "2", "--batch_size", "24", "--content", "none"]


class Terminal(io.StringIO):
    """Standard output and error of a terminal, and what is on its screen in the end."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for token in re.split(r"(\n|\r|\x1b\[A)", self.getvalue()):
            if token == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif token in ("\r", "\x1b[A"):
                row, column = (row, 0) if token == "\r" else (row - 1, column)
            else:
                line_start = lines[row].ljust(column)
                lines[row] = line_start[:column] + token + line_start[column + len(token) :]
                column += len(token)
        return [line.rstrip() for line in lines]


@contextmanager
def terminal() -> Iterator[Terminal]:
    shown = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        patch.setattr(sys, "stderr", shown)
        yield shown


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset with a second label, the opposite of the first."""
    data = write_dataset(tmp_path_factory.mktemp("shown") / "data")
    schema = data / "schema.yaml"
    label = "  liked:   {kind: label}\n"
    schema.write_text(schema.read_text().replace(label, label + label.replace("liked", "hated")))
    for file in data.glob("t*/*.parquet"), data.glob("valid/*.parquet"):
        for path in file:
            table = pq.read_table(path)
            hated = pc.subtract(pa.scalar(1.0, pa.float32()), table["liked"])
            pq.write_table(table.append_column("hated", hated), path, row_group_size=11)
    return data


@pytest.fixture(scope="module")
def trained(data: Path) -> Terminal:
    """The terminal of a run whose epochs have fewer steps than lie between two logs."""
    with terminal() as shown:
        assert main([*train_argv(data, data.parent / "run"), *SHORT]) == 0
    return shown


def test_each_epoch_has_a_bar_that_ends_with_a_loss(trained: Terminal) -> None:
    for epoch in (1, 2):
        (bar,) = [line for line in trained.screen() if line.startswith(f"epoch {epoch}/2: ")]
        assert "3/3 [" in bar and "<00:00" in bar
        assert re.search(r"loss \d\.\d{4} .* samples/s\]$", bar)


def test_every_label_is_shown_and_the_step_whose_model_was_tested(trained: Terminal) -> None:
    *_, valid, test = re.split(r"^validation|^test", "\n".join(trained.screen()), flags=re.M)
    for table in (valid, test):
        assert re.findall(r"^label (\w+) +auc +gauc", table, flags=re.M) == ["liked", "hated"]
    assert re.match(r", .*step [36]\n", test)


def test_evaluate_and_predict_show_bars_and_leave_none(data: Path, trained: Terminal) -> None:
    run, out = str(data.parent / "run"), str(data.parent / "out.parquet")
    for argv in (
        ["evaluate", "--run", run, "--split", "valid"],
        ["predict", "--run", run, "--input", str(data / "test"), "--out", out],
    ):
        with terminal() as shown:
            assert main([*argv, "--device", "cpu"]) == 0
        assert "scored batches:" in shown.getvalue()
        assert "scored batches" not in "".join(shown.screen())


def test_lines_and_no_bar_where_there_is_no_terminal_or_json_is_asked_for(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*train_argv(data, data.parent / "lines"), *SHORT, "--overwrite", "true"]
    with terminal():
        configure_logging(log_format="json")
        assert progress_bar(3, "any").disable
        configure_logging()
        assert not progress_bar(3, "any").disable
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert re.search(r"^epoch 1 step 3/3 loss .* samples/s, 00:00 left$", output, flags=re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry_run")
    write_dataset(root / "data", {"train": 64, "valid": 32, "test": 20})
    return root


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.parts}


def steps_on(rank: int, world_size: int, folder: Path) -> DryRun:
    return dry_run(em3_config(folder), str(folder / "data"), ranks_of(rank, world_size))


def test_one_step_on_each_rank_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_files = files_of(folder)
    argv = train_argv(folder / "data", folder / "run", "--dry-run")
    index = argv.index("--out")
    assert main([*argv[:index], *argv[index + 2 :]]) == 0

    assert files_of(folder) == old_files
    printed = capsys.readouterr().out
    assert "dry run: " in printed and " 8 rows on 1 rank" in printed
    assert "32 validation rows" in printed


def test_ranks_agree_on_losses_and_tell_each_their_memory(folder: Path) -> None:
    first, second = run_on_ranks(steps_on, 2, folder)

    assert first.losses == second.losses
    weight = em3_config(folder).contrastive.weight
    total = first.losses["ranking"] + weight * first.losses["contrastive"]
    assert first.losses["loss"] == pytest.approx(total, rel=1e-5)
    assert first.peak_bytes == second.peak_bytes and len(first.peak_bytes) == 2
    assert all(peak > 2**26 for peak in first.peak_bytes)  # torch alone takes more
    assert " GiB " in str(first)


def test_a_run_needs_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = train_argv(folder / "data", folder / "run")
    index = argv.index("--out")
    assert main([*argv[:index], *argv[index + 2 :]]) == 1
    assert "train needs --out" in capsys.readouterr().err
