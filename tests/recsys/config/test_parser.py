"""The command line and recipes are parsed alike, and equal settings once."""

import copy
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import yaml

from recsys.cli import main
from recsys.commands.options import command_parser
from recsys.config import Config, ContentSettings, load_config
from recsys.config.parser import (
    CHOSEN_BY_USERS,
    dataclass_in,
    is_parsed_as,
    is_plainly_of,
    problem_of_value,
    with_underscores,
)
from recsys.config.plain_yaml import NUM_RESULTS, RefusedYaml, cached_copy, load_plain_yaml
from tests.recsys.command_runs import TINY

ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "part.yaml"


@pytest.mark.parametrize("recipe", ["{file}", "embedding: {file}", "content: {file}"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, r"line 2: alias \*a"),
        ("dim: 8\n\ndim: 16\n", "'dim' .* lines 1 and 3"),
        ("class_path: os.system\n", "class_path"),
    ],
)
def test_a_file_that_is_more_than_data_is_refused_even_inside_a_recipe(
    file: Path, tmp_path: Path, recipe: str, text: str, message: str
) -> None:
    file.write_text(text)
    outer = file
    if recipe != "{file}":
        outer = tmp_path / "recipe.yaml"
        outer.write_text(recipe.format(file=file))
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        load_config(outer)


@pytest.mark.parametrize("value", ["{a: 1, a: 2}", "{a: &a [1], b: *a}"])
def test_a_value_on_the_command_line_that_is_more_than_data_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer.options: .*(twice|alias)"):
        load_config(TINY, ["--optimizer.options", value])


@pytest.mark.parametrize("separator", [None, "#", "#;", "~", "\t", "\\", "'\"", "é", "1"])
@pytest.mark.parametrize("form", ["recipe", "option", "mapping"])
def test_a_nested_text_or_null_has_its_value_in_recipes_options_and_mappings(
    file: Path, separator: str | None, form: str
) -> None:
    words: dict[str, Any] = {"kind": "terms", "column": "text", "separator": separator}
    argv = {
        "recipe": [],
        "option": ["--content.modalities.words.separator", separator or "null"],
        "mapping": ["--content.modalities.words", yaml.safe_dump(words)],
    }[form]
    written = words if form == "recipe" else words | {"separator": ","}
    file.write_text(yaml.safe_dump({"content": {"modalities": {"words": written}}}))
    content = load_config(file, argv).content
    assert isinstance(content, ContentSettings)
    assert content.modalities["words"].separator == separator


def test_options_of_a_class_of_your_own_have_their_types_on_the_command_line() -> None:
    options = {"a": None, "b": ["\t", None], "c": {"d": float("inf")}, "e": True}
    fusion = {"name": "my:Fusion", "options": options}
    for argv in (
        ["--content.fusion", yaml.safe_dump(fusion)],
        ["--content.fusion.name", "my:Fusion", "--content.fusion.options", yaml.safe_dump(options)],
    ):
        content = load_config(TINY, argv).content
        assert isinstance(content, ContentSettings)
        assert content.fusion.options == options


def test_the_command_line_overrides_the_recipe_in_any_order(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("batch_size: 8\n")
    for argv in (["--batch_size", "0", "--config", str(file)], [f"--config={file}"]):
        assert main(["train", *argv, "--batch_size=0", "--data", "none", "--out", "none"]) == 1
        assert "batch_size is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "3"], "--batchsize; .* --batch-size"),
        (["--content.dims", "3"], "content.dims .* dim"),
        (["--embedding.tables", "{a: {shardin: x}}"], r"tables.a.shardin .* mean sharding"),
        (["--ranking.mlp_unit", "3"], "mlp_unit .* mean mlp_units"),
        (["--config", "{optimiser: {name: sgd}}"], "optimiser .* mean optimizer"),
        (["--content.modalities.text.max_length", "x"], "modalities.text.max_length is x"),
        (["--optimizer", "[1]"], r"optimizer is \[1\]"),
        (["--content", "nonne"], "content .*nonne"),
        (["--tracker", "3", "--resume", "sometimes"], "resume is sometimes"),
        (["--overwrite", "maybe"], "overwrite is maybe"),
        (["--compare", "x"], "compare is x; .*'id_only'"),
        (["--config", "{content: {modalities: {title: {kind: text}}}}"], "title .* column"),
        (["--config", "{config: /etc/hostname}"], "config .*setting"),
        (["--config", "{auxiliary: {teacher: {weight: 1.0}}}"], "auxiliary.teacher has no loss"),
        (["--config", "{content: {history: {rate: {}}}}"], "content.history.rate is no setting"),
        (["--config", "{metrics: }"], "metrics is empty"),
        (["--config", "{batch_size: 8, no: 3}"], "line 1: key no .*bool"),
    ],
)
def test_what_is_wrong_is_named_in_a_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["train", "--config", str(TINY), "--data", "none", "--out", "none", *argv])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    (line,) = capsys.readouterr().err.splitlines()
    assert code and re.search(message, line), line
    assert "Namespace(" not in line and "Arg(" not in line and "<class" not in line


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["search", "--trials=0"], "0"), (["retrieve", "--top-k=abc"], "abc")],
)
def test_the_limit_of_a_number_of_a_command_is_named(
    argv: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*argv, "--data", "none", "--out", "none"])
    option = argv[1].partition("=")[0]
    assert f"{option} is {value}; it must be an integer above 0" in capsys.readouterr().err


def test_a_command_of_another_name_is_taken_for_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tarin"]) == 2
    assert "mean train?" in capsys.readouterr().err


def test_every_option_of_train_has_a_sentence() -> None:
    _, parser = command_parser("train", ["--ranking.name", "sim", "--help"])
    options = {action.dest: action.help for action in parser._actions}
    assert {"ranking.search_top_k", "optimizer.name", "epochs", "out"} <= options.keys()
    assert [name for name, sentence in options.items() if not sentence] == []


def test_a_text_that_would_take_long_to_parse_is_refused() -> None:
    with pytest.raises(RefusedYaml, match="4,194,304"):
        load_plain_yaml(b"a: " + b"x" * 4 * 2**20)


def test_hyphens_and_underscores_spell_the_same_option_except_in_names_that_users_choose() -> None:
    argv = ["--batch-size", "8", "--content.modalities.my-text.max-length=4", "--warm-start-only"]
    assert with_underscores(argv) == [
        *("--batch_size", "8", "--content.modalities.my-text.max_length=4", "--warm_start_only")
    ]
    recipe = load_config("tiny", ["--batch-size", "8", "--contrastive.all-ranks", "--tf32"])
    assert (recipe.batch_size, recipe.contrastive.all_ranks, recipe.tf32) == (8, True, True)


def test_every_mapping_with_keys_of_users_keeps_their_spelling() -> None:
    def mappings(kind: type, path: str) -> Iterator[str]:
        for name, hint in get_type_hints(kind).items():
            if get_origin(hint) is dict and name not in ("options", "schedule_options"):
                yield f"{path}{name}"
            if (inner := dataclass_in(hint)) is not None and get_origin(hint) is not dict:
                yield from mappings(inner, f"{path}{name}.")

    assert all(re.match(CHOSEN_BY_USERS + "$", path) for path in mappings(Config, ""))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recsys {version('recsys-em3')}\n"


def test_the_completion_of_bash_has_commands_and_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    tokens = set(re.findall(r"[\w.-]+", script))
    assert {"explain-data", "add-items", "--embedding.learning-rate", "--from"} <= tokens


def test_equal_settings_are_parsed_once_and_returned_as_copies() -> None:
    calls = []

    @cached_copy
    def parse(content: dict[str, Any]) -> dict[str, Any]:
        calls.append(content)
        return {"parsed": [content["a"]]}

    first = parse({"a": 3})
    first["parsed"].append(4)
    assert parse({"a": 3}) == {"parsed": [3]}
    assert len(calls) == 1
    for number in range(NUM_RESULTS):
        parse({"a": 10 + number})
    assert parse({"a": 3}) == {"parsed": [3]}
    assert len(calls) == NUM_RESULTS + 2  # the oldest result had been dropped


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (1, "1"), (None, "None")])
def test_values_and_keys_of_other_types_are_parsed_by_themselves(one: Any, other: Any) -> None:
    parse = cached_copy(
        lambda content: [(type(key), type(value)) for key, value in content.items()]
    )
    for key in ("a", one):
        assert parse({key: one}) == [(type(key), type(one))]
        assert parse({key: other}) == [(type(key), type(other))]
    assert parse({other: one}) == [(type(other), type(one))]


TEXTS = [
    "",
    "a",
    "null",
    "true",
    "1",
    "1e3",
    "*a",
    "[a",
    "{a: 1}",
    "a: &b",
    "{a: 1, a: 2}",
    "@",
    "-",
]
VALUES = [*TEXTS, TEXTS, True, 0, 2**70, 1.5, float("inf"), None, [], [1], [1.5, "a"], [None], {}]


@pytest.mark.parametrize(
    ("hint", "number"),
    [
        *((str, len(TEXTS)), (bool, 1), (int, 2), (float, 2), (None, 0)),
        *((Literal["a", "b"], 1), (list[str], 2), (list[int], 2), (list[float | str], 3)),
        *((int | float | str | None, len(TEXTS) + 5), (list[str] | str, len(TEXTS) + 2)),
        *((dict[str, str], 0), (Any, 0)),
    ],
)
def test_what_is_plainly_of_a_type_is_what_the_parser_takes(hint: Any, number: int) -> None:
    values = [value for value in VALUES if is_plainly_of(hint, value)]
    assert all(is_parsed_as(hint, copy.deepcopy(value)) for value in values)
    assert len(values) == number


def test_a_path_is_text_whatever_its_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.parquet").write_text("null")
    kind: Any = str | list[str]
    assert problem_of_value(kind, "items.parquet", "items.path") is None
    assert problem_of_value(kind, "null", "items.path") is not None
