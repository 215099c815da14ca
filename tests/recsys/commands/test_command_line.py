"""Commands: options, errors, and slow packages that are imported only when they are needed."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsys.cli import main
from recsys.commands.options import command_parser
from recsys.config.named_parts import find_part
from recsys.config.ranking import RANKING_MODELS, settings_class
from tests.datasets import write_dataset
from tests.recsys.command_runs import ROOT, TINY, run_program, train_argv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_dataset(folder / "data")
    assert main(train_argv(folder / "data", folder / "run")) == 0
    return folder


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with exit code 1 and returns the line that says why."""

    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 1
        # A bar that counts encoded items may stand before it; a traceback may not.
        *earlier_lines, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert all(text.startswith("encoding ") for text in earlier_lines)
        return line

    return run


def test_without_arguments_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    output = capsys.readouterr().out
    for command in ("doctor", "prepare", "train", "evaluate", "predict"):
        assert command in output


def test_options_may_stand_before_the_action(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, error in (
        (["--log-level=debug", "movielens", "--split", "any"], "split is any"),
        (["--out", "movielens", "events"], "prepare events needs --config"),
    ):
        with pytest.raises(SystemExit):
            main(["prepare", *argv])
        assert error in capsys.readouterr().err


def test_a_missing_dataset_is_named_beside_a_setting_of_a_modality(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--config", "tiny", "--out", "run", "--content.modalities.text.max_length", "8"]
    with pytest.raises(SystemExit):
        main(["train", *argv])
    assert "train needs --data" in capsys.readouterr().err


def test_train_evaluate_and_predict_work_in_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "run")
    capsys.readouterr()
    assert main(["evaluate", "--run", run, "--split", "valid"]) == 0
    assert capsys.readouterr().out.startswith("valid\n")
    out = tmp_path / "out.parquet"
    inputs = str(folder / "data" / "test")
    assert main(["predict", "--run", run, "--input", inputs, "--out", str(out)]) == 0
    assert pq.read_table(out).num_rows == 20


def test_evaluate_says_where_a_blend_was_fitted_to_the_rows(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = train_argv(folder / "data", tmp_path / "run", "--content", "none", "--epochs", "1")
    assert main([*argv, "--neighbours", "{dim: 4, taste_dim: 4}"]) == 0
    fitted = "fitted the blend of model and neighbours to these rows"
    for split, is_fitted in (("test", False), ("valid", True)):
        assert main(["evaluate", "--run", str(tmp_path / "run"), "--split", split]) == 0
        assert (fitted in "".join(capfd.readouterr())) == is_fitted


@pytest.mark.long
def test_torchrun_evaluates_with_dashes_before_the_module(folder: Path) -> None:
    ranks = ["--standalone", "--nproc-per-node", "2", "-m", "--", "recsys.cli"]
    argv = ["evaluate", "--run", str(folder / "run"), "--split", "valid"]
    process = run_program("torchrun", *ranks, *argv)
    assert process.returncode == 0, process.stderr
    assert (folder / "run" / "evaluation_valid.json").is_file()


def test_an_earlier_run_is_not_overwritten_unless_asked(folder: Path, fails: Fails) -> None:
    argv = train_argv(folder / "data", folder / "again", "--content", "none")
    assert main(argv) == 0
    old_metrics = (folder / "again" / "metrics.json").read_bytes()
    assert main(argv) == 0  # finished: nothing is left to train
    assert (folder / "again" / "metrics.json").read_bytes() == old_metrics
    assert "--overwrite" in fails(*argv, "--resume", "never")
    assert (folder / "again" / "metrics.json").read_bytes() == old_metrics
    assert main([*argv, "--overwrite", "true"]) == 0


def test_a_missing_dataset_file_or_run_is_named(folder: Path, tmp_path: Path, fails: Fails) -> None:
    missing, out, run = tmp_path / "none", tmp_path / "out.parquet", folder / "run"
    assert f"{missing}/schema.yaml: " in fails(*train_argv(missing, tmp_path / "run"))
    assert f"{missing}: " in fails("evaluate", "--run", missing)
    assert f"{run}/checkpoints" not in fails("evaluate", "--run", run, "--split", "holdout")
    assert "'valid/'" in fails("evaluate", "--run", run, "--split", "valid/")
    argv = ["predict", "--run", run, "--out", out, "--input"]
    assert f"{missing}: " in fails(*argv, missing)
    assert "nodrive://rows" in fails(*argv, "nodrive://rows")
    assert "a\\x00b" in fails(*argv, "a\0b")
    assert not out.exists()


def test_an_option_of_several_values_may_be_given_several_times() -> None:
    argv = ["--run", "run", "--input", "a", "--input", "b", "c", "--out", "rows"]
    _, parser = command_parser("predict", argv)
    assert parser.parse_args(argv).input == ["a", "b", "c"]


@pytest.mark.parametrize("option", ["--run", "--out"])
def test_a_url_of_what_must_be_local_is_refused_and_no_folder_s3_is_made(
    folder: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv: dict[str, str | Path] = {"--run": folder / "run", "--out": "rows.parquet"}
    argv[option] = "s3://bucket/a"
    error = fails("predict", "--input", folder / "data" / "test", *itertools.chain(*argv.items()))
    assert f"{option[2:]}: s3://bucket/a: " in error
    assert not list(tmp_path.iterdir())


def test_a_url_of_the_cache_is_refused(folder: Path, tmp_path: Path, fails: Fails) -> None:
    argv = train_argv(folder / "data", tmp_path / "run", "--cache", "s3://bucket/cache")
    assert "s3://bucket/cache: must be a local path" in fails(*argv)


def test_a_home_folder_that_no_shell_has_expanded_is_expanded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--run", str(folder / "run"), "--input", str(folder / "data" / "test")]
    assert main(["predict", *argv, "--out=~/rows.parquet", "--device", "cpu"]) == 0
    assert (tmp_path / "rows.parquet").is_file()


def test_predict_writes_the_whole_file_or_none(folder: Path, tmp_path: Path, fails: Fails) -> None:
    """The second input has a column more, which shows only after the first has been written."""
    table = pq.read_table(folder / "data" / "test" / "part-0.parquet")
    pq.write_table(table, tmp_path / "first.parquet")
    second = table.append_column("extra", table["price"])
    pq.write_table(second, tmp_path / "second.parquet")
    out = tmp_path / "out" / "predictions.parquet"
    inputs = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    line = fails("predict", "--run", folder / "run", "--out", out, "--input", *inputs)
    assert "second.parquet" in line and "columns differ" in line
    assert list(tmp_path.glob("out/*")) == []


def test_predicting_into_a_column_that_exists_is_refused(
    folder: Path, tmp_path: Path, fails: Fails
) -> None:
    table = pq.read_table(folder / "data" / "test" / "part-0.parquet")
    source = tmp_path / "scored.parquet"
    pq.write_table(table.append_column("prediction_liked", table["price"]), source)
    out = tmp_path / "out.parquet"
    line = fails("predict", "--run", folder / "run", "--out", out, "--input", source)
    assert "column 'prediction_liked' already" in line


# Runs the command lines, and names the slow packages that are imported after each of them.
PROGRAM = """
import contextlib, io, sys
from recsys.cli import main
for line in sys.argv[1:]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(line.split())
        except SystemExit as stopped:
            code = stopped.code
    slow = [name for name in ("torch", "torchrec", "transformers", "peft") if name in sys.modules]
    print(code, *slow)
"""


def test_help_and_errors_of_arguments_and_files_import_no_slow_package(tmp_path: Path) -> None:
    none = tmp_path / "none"
    train = f"train --config {TINY} --data {none} --out {none}/run"
    codes = {
        "--help": 0,
        "train --help": 0,
        "train --ranking.name sim --help": 0,
        "describe --help": 0,
        "prepare movielens --help": 0,
        "predict --help": 0,
        "no-such-command": 2,
        f"{train} --batchsize 3": 2,
        f"{train} --batch_size many": 2,
        f"{train} --batch_size 0": 1,
        f"{train} --content.dim 15": 1,
        f"train --config {none} --data {none} --out {none}/run": 2,
        train: 1,  # no such dataset
        f"evaluate --run {none}": 1,
        f"prepare movielens --source {none} --out {none}/data": 1,
        f"prepare vocabulary --data {none}": 1,
        f"prepare transforms --data {none}": 1,
        f"explain-data {none}": 1,
        f"compare --runs {none} {none}": 1,
    }
    argv = [sys.executable, "-c", PROGRAM, *codes]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    outputs = dict(zip(codes, process.stdout.splitlines(), strict=True))
    assert outputs == {line: str(code) for line, code in codes.items()}


def test_an_id_only_job_imports_no_package_of_encoders(folder: Path) -> None:
    line = f"train --config id_only --data {folder}/data --dry-run --device cpu"
    argv = [sys.executable, "-c", PROGRAM, f"{line} --embedding.tables {{}}"]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["0", "torch", "torchrec"]


def test_the_settings_that_help_prints_are_those_of_the_models() -> None:
    for name in RANKING_MODELS:
        assert settings_class(name) is find_part("ranking.name", name, RANKING_MODELS).Settings
