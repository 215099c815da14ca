"""What is wrong with data, encoders or settings ends every rank with the cause before any training.

Each input is trained on by two ranks as `recsys train` would. The lists are in `bad_files`,
`bad_impressions`, `bad_items` and `bad_settings`: what is broken, and what the error must say.
"""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from recsys.config import Config, load_config
from recsys.distributed.ranks import Ranks
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import HANG_SECONDS, run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.config import bad_settings
from tests.recsys.data import bad_impressions
from tests.recsys.data.bad_impressions import BadInput
from tests.recsys.data.items import bad_items
from tests.recsys.data.parquet import bad_files

CASES: dict[str, BadInput] = {
    f"{kind}: {name}": bad
    for kind, cases in {
        "file": bad_files.FILES,
        "type": bad_impressions.TYPES,
        "value": bad_impressions.VALUES,
        "items": bad_items.ITEMS,
        "schema": bad_settings.SCHEMAS,
        "encoder": bad_settings.ENCODERS,
    }.items()
    for name, bad in cases.items()
} | {
    f"setting: {name}": BadInput(bad_settings.nothing, [text], (setting,))
    for name, (setting, text) in bad_settings.SETTINGS.items()
}
Outcome = tuple[str, str]  # type and message of what was raised


def folder_of(case: str, folder: Path) -> Path:
    return folder / str(list(CASES).index(case))


@cache
def recipe(settings: tuple[str, ...]) -> Config | ValueError:
    """The tiny recipe with some settings; reading it takes longer than finding most faults."""
    try:
        return load_config(TINY, ["--batch_size", "8", "--device", "cpu", *settings])
    except ValueError as error:
        return error


def recipes(folder: Path) -> dict[str, Config | ValueError]:
    """The recipe of each case, or why it cannot be read, which is the same on every rank."""
    return {
        case: recipe(
            tuple(
                text.replace("DATA", str(folder_of(case, folder) / "data")) for text in bad.settings
            )
        )
        for case, bad in CASES.items()
    }


def errors_of_training(
    rank: int, world_size: int, folder: Path, configs: dict[str, Config | ValueError]
) -> dict[str, Outcome]:
    """What this rank raised, by case."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    outcomes = {}
    for case, config in configs.items():
        case_folder = folder_of(case, folder)
        try:
            if isinstance(config, ValueError):
                raise config
            config = replace(config, cache=str(case_folder / "cache"))
            train(config, str(case_folder / "data"), case_folder / "run", ranks)
            error: Exception | str = "it was trained on"
        except Exception as raised:
            error = raised
        outcomes[case] = (type(error).__name__, str(error))
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = write_dataset(folder / "good", {"train": 61, "valid": 25, "test": 23})
    for case, bad in CASES.items():
        bad.spoil(Path(shutil.copytree(good, folder_of(case, folder) / "data")))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Outcome]]:
    patience = 3 * HANG_SECONDS
    return run_on_ranks(errors_of_training, 2, folder, recipes(folder), timeout_seconds=patience)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_with_the_cause(
    outcomes: list[dict[str, Outcome]], folder: Path, case: str
) -> None:
    case_folder = folder_of(case, folder)
    for rank in outcomes:
        kind, message = rank[case]
        for text in CASES[case].messages:
            assert text.replace("DATA", str(case_folder / "data")) in message
        assert kind == "ValueError"
        assert len(message) < 1500  # for people
    assert not (case_folder / "run").exists()
