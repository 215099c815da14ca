"""A run and a package that are pushed and pulled are equal, and their card has the metrics."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from recsys.commands.hub import model_card, pull, push
from recsys.storage import manifest
from tests.recsys.commands.hub_server import Hub

METRICS = '{"test": {"auc": 0.75, "gauc": null, "num_samples": 1200, "unseen": {"auc": null}}}'
CONFIG = "content: {modalities: {title: {kind: text, encoder: mini}}}\nranking: {name: din}\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(server.url, token="hf_test"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "shop"
    (folder / "checkpoints" / "best").mkdir(parents=True)
    (folder / "metrics.json").write_text(METRICS)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "checkpoints" / "best" / ".metadata").write_bytes(bytes(range(256)))
    (folder / ".job.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_comes_back_as_it_was_without_the_lock_of_its_machine(hub: Hub, run: Path) -> None:
    push(run, "me/shop")
    pull("me/shop", run.parent / "again")
    again = contents(run.parent / "again")
    assert ".job.json" not in again
    assert again | {".job.json": b"{}"} == contents(run)
    assert hub.private == {"me/shop"}


def test_a_later_push_leaves_no_file_of_an_earlier_one(hub: Hub, run: Path) -> None:
    """Checkpoints of two runs would be one: the newest by its number may be of the older run."""
    (run / "checkpoints" / "step-9").mkdir()
    (run / "checkpoints" / "step-9" / ".metadata").write_bytes(b"older")
    push(run, "me/shop")
    hub.repositories["me/shop"][".gitattributes"] = b"of the Hub"
    shutil.rmtree(run / "checkpoints" / "step-9")
    push(run, "me/shop")
    assert ".gitattributes" in hub.repositories["me/shop"]
    pull("me/shop", run.parent / "again")
    assert contents(run.parent / "again") | {".job.json": b"{}"} == contents(run)


def test_the_card_has_the_metrics_the_model_and_the_commands(hub: Hub, run: Path) -> None:
    push(run, "me/shop")
    card = hub.repositories["me/shop"]["README.md"].decode()
    assert card == model_card(run, "me/shop")
    assert "| all | 0.7500 | 1,200 |" in card
    assert "| unseen | - | - |" in card
    assert "`din` reads title (text, mini)" in card
    assert "recsys pull me/shop --out runs/shop" in card


def test_a_damaged_package_is_neither_pushed_nor_pulled(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recsys.serving.package as package

    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "graph.pt2").write_bytes(b"graph")
    checked = []
    monkeypatch.setattr(package, "read_manifest", checked.append)
    manifest.write_signed(folder / "manifest.json", {"format": package.FORMAT})
    push(folder, "me/package")
    monkeypatch.undo()
    assert checked == [folder]
    with pytest.raises(ValueError, match=r"manifest\.json"):
        push(folder, "me/package")


def test_machine_code_is_pulled_on_request_alone(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/compiled"] = {"compiled.pt2": b"", "manifest.json": b"{}"}
    with pytest.raises(ValueError, match="--compiled true"):
        pull("me/compiled", tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_what_is_neither_run_nor_package_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/other"] = {"model.bin": b""}
    with pytest.raises(ValueError, match="neither a finished run nor a package"):
        pull("me/other", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_repository_that_is_missing_is_named_with_the_fix(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"me/missing.*hf auth login"):
        pull("me/missing", tmp_path / "run")


def test_a_folder_that_exists_is_not_overwritten(hub: Hub, run: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        pull("me/shop", run)
