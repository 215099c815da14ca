"""Runs that begin from another one: what they predict at once, and where each value is from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from recsys.build import Job, build_job
from recsys.checkpoint.files import folders_by_age
from recsys.checkpoint.warm_start import rows
from recsys.checkpoint.warm_start.source import WarmStart
from recsys.config import Config, ContentSettings, ModalitySettings
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import load_run
from recsys.ranking.neighbours import Neighbours
from recsys.training import dry_run
from recsys.training.dry_run import dry_run as try_one_step
from recsys.training.train import training_interactions
from tests.recsys.checkpoint.schema_runs import rewrite
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    assert_equal,
    begin,
    best_of,
    changed,
    config_of,
    grow,
    ids_of,
    last_of,
    logits,
    start,
    state_of,
    stored_state,
    write_ids,
    write_run,
)

NEIGHBOURS = ("--neighbours", "{values: history_age, dim: 4, taste_dim: 4}")


@pytest.fixture(scope="module")
def fresh(plain: Path) -> dict[str, Tensor]:
    """The state of a new run without another one."""
    with joined_ranks("cpu") as ranks:
        return state_of(build_job(config_of(plain, *WITHOUT_CONTENT), str(plain / "data"), ranks))


SIDE = ["--content.modalities.text.training", "side"]


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text encoder has a side network."""
    return write_run(tmp_path_factory.mktemp("side"), *SIDE)


@pytest.mark.parametrize("kind", ["plain", "multimodal", "side"])
def test_without_a_step_a_run_predicts_what_the_other_one_did(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    argv = {"plain": WITHOUT_CONTENT, "side": SIDE}.get(kind, [])
    with joined_ranks("cpu") as ranks:
        expected = logits(load_run(folder / "run", None, ranks, "cpu"))
        new = begin(folder, tmp_path / "new", ranks, *argv)
        assert new.text == "nothing differs"
        assert torch.equal(logits(new.job), expected)
        assert_equal(state_of(new.job), stored_state(best_of(folder)), "")


def test_a_dry_run_takes_the_first_step_of_the_run_that_would_be_begun(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, data = config_of(plain, *WITHOUT_CONTENT), str(changed(plain, tmp_path, grow))
    with joined_ranks("cpu") as ranks:
        tried = try_one_step(config, data, ranks, WarmStart(plain / "run"))
        new = begin(plain, tmp_path / "new", ranks, *WITHOUT_CONTENT, data=Path(data))
        interactions = training_interactions(new.job)
        assert dry_run._train_step(new.job, interactions, Lockstep(ranks))[0] == tried.losses
        assert try_one_step(config, data, ranks).losses != tried.losses
    assert re.search("table 'shop' +grew from 5 to 8 rows", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


def test_the_last_checkpoint_comes_with_its_optimizers_and_averages_are_listed(
    plain: Path, tmp_path: Path
) -> None:
    argv = (*WITHOUT_CONTENT, "--optimizer.ema_decay", "0.9")
    with start(plain, tmp_path / "new", *argv, checkpoint="last") as new:
        state = state_of(new.job)
        assert_equal(state, stored_state(last_of(plain)), "model.", "vocabulary.", "optimizer.")
        assert new.progress.steps == 0 and new.progress.steps_before == 8
        assert new.progress.table_steps == 8
        assert re.search(r"averaged weights .*  begin at", new.text)
    stored = json.loads((tmp_path / "new" / "warm_start.json").read_text())
    assert stored["step"] == 8 and stored["checkpoint"] == last_of(plain).name


def test_the_state_of_optimizers_may_be_of_another_step(plain: Path, tmp_path: Path) -> None:
    """Of all but bounded tables, whose rows have had other ids."""
    run = tmp_path / "run"
    shutil.copytree(plain / "run", run)
    newest, older = folders_by_age(run / "checkpoints")
    assert json.loads((run / "checkpoints" / "best" / "checkpoint.json").read_text())["step"] == 8
    shutil.rmtree(newest)
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, run=run) as new:
        assert re.search("optimizer state +.* not of the model's step 8 +of step 4", new.text)
        assert re.search("optimizer state of 'user' .*other ids since +begins anew", new.text)
        state = state_of(new.job)
        assert (new.progress.age, new.progress.table_steps) == (8, 4)
    bags = "optimizer.tables.embedding_bags.embedding_bags"
    assert not state[f"{bags}.user.weight.momentum1.columns_0_16"].any()
    assert_equal(state, stored_state(older), f"{bags}.shop", "optimizer.dense.")
    assert_equal(state, stored_state(best_of(plain)), "user", "vocabulary.")


def test_optimizers_begin_anew_where_asked(plain: Path, tmp_path: Path) -> None:
    with start(plain, tmp_path / "new", *WITHOUT_CONTENT, optimizer=False) as new:
        moments = {k: v for k, v in state_of(new.job).items() if k.startswith("optimizer.")}
        assert len(moments) == 4 and not any(value.any() for value in moments.values())
        assert new.progress.table_steps == 0 and new.progress.age > 0
        assert re.search(r"optimizer state +as asked +begins anew", new.text)


@pytest.mark.parametrize(
    ("request_", "equal_modules", "anew"),
    [
        ({"skip": ("ranking.*",)}, ["item", "user"], ["model.ranking."]),
        ({"only": ("ranking.*",)}, ["model.ranking."], ["item", "user"]),
        ({"skip": ("*.user.weight",)}, ["item", "model.ranking."], ["user"]),
        ({"only": ("embed*",), "skip": ("*.item.*",)}, ["user"], ["item", "model.ranking."]),
    ],
)
def test_what_is_not_asked_for_begins_anew_and_its_optimizer_state_with_it(
    plain: Path,
    tmp_path: Path,
    fresh: dict[str, Tensor],
    request_: dict[str, Any],
    equal_modules: list[str],
    anew: list[str],
) -> None:
    with joined_ranks("cpu") as ranks:
        new = begin(plain, tmp_path / "new", ranks, *WITHOUT_CONTENT, **request_)
        state, old = state_of(new.job), stored_state(best_of(plain))
    assert_equal(state, old, *equal_modules)
    assert_equal(state, fresh, *anew)
    moments = [name for name in new.plan.tensors if name.startswith("optimizer.")]
    assert moments
    for name in moments:
        weight = re.sub(r"optimizer\.(tables|dense)\.(.*)\.[^.]+$", r"\2", name)
        weight = weight.removesuffix(".momentum1")
        assert new.plan.takes(weight), name
    assert "not asked for" in new.text
    if "user" in anew:
        assert not state["vocabulary.user.scores"].any()
        assert re.search(r"vocabulary of 'user' .*  begins empty", new.text)


def test_rows_follow_their_ids_and_new_ones_have_the_initial_values_of_the_new_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 300)  # several blocks of each tensor
    old_ids = ids_of(plain / "data")
    new_ids = [901, *reversed(old_ids), 902]
    data = write_ids(changed(plain, tmp_path, grow), new_ids)
    argv = (*WITHOUT_CONTENT, "--seed", "5")
    with joined_ranks("cpu") as ranks:
        fresh = state_of(build_job(config_of(plain, *argv), str(data), ranks))
        new = begin(plain, tmp_path / "new", ranks, *argv, data=data, checkpoint="last")
        state, old = state_of(new.job), stored_state(last_of(plain))
    moment = "optimizer.tables.embeddings.embeddings.item.weight.momentum1.columns_0_16"
    for name, empty in (("item", fresh["item"]), (moment, torch.zeros(55))):
        for row, raw in enumerate(new_ids):
            expected = old[name][old_ids.index(raw)] if raw in old_ids else empty[row]
            assert torch.equal(state[name][row], expected), (name, raw)
        assert torch.equal(state[name][len(new_ids) : 54], empty[len(new_ids) : 54])
        assert torch.equal(state[name][54], old[name][39])  # of unknown ids
    assert torch.equal(state["shop"], torch.cat([old["shop"], fresh["shop"][5:]]))
    _assert_users_moved(state, old, fresh)


@pytest.fixture(scope="module")
def with_neighbours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has statistics of neighbours."""
    return write_run(tmp_path_factory.mktemp("neighbours"), *WITHOUT_CONTENT, *NEIGHBOURS)


def test_statistics_of_neighbours_go_with_their_items(
    with_neighbours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.training.initial_state.fit_neighbours", lambda *arguments: None)
    old_ids = ids_of(with_neighbours / "data")
    new_ids = [901, *reversed(old_ids)]
    data = write_ids(changed(with_neighbours, tmp_path, grow), new_ids)
    argv = (*WITHOUT_CONTENT, *NEIGHBOURS)
    old = stored_state(best_of(with_neighbours))
    names = [f"model.neighbours.{name}" for name in Neighbours.item_row_buffers]
    with start(with_neighbours, tmp_path / "new", *argv, data=data) as new:
        moved = state_of(new.job)
    for name in names:
        assert old[name].any()
        for row, raw in enumerate(new_ids):
            is_old = raw in old_ids
            expected = old[name][old_ids.index(raw)] if is_old else torch.zeros_like(old[name][0])
            assert torch.equal(moved[name][row], expected), (name, raw)
    skipped = {"skip": ["*.item.weight"], "data": data}
    with start(with_neighbours, tmp_path / "other", *argv, **skipped) as new:
        assert not any(state_of(new.job)[name].any() for name in names)
        assert "neighbours.taste" in new.text and "counted anew" in new.text


def _assert_users_moved(
    state: dict[str, Tensor], old: dict[str, Tensor], fresh: dict[str, Tensor]
) -> None:
    """Rows, moments and counts of the bounded vocabulary go together, by id."""
    moment = "optimizer.tables.embedding_bags.embedding_bags.user.weight.momentum1.columns_0_16"
    names = [f"vocabulary.user.{name}" for name in ("ids", "last_used", "scores")]
    ids, last_used, scores = (state[name].flatten() for name in names)
    old_ids, old_used, old_scores = (old[name].flatten() for name in names)
    used_rows = (old_used >= 0).nonzero().flatten().tolist()
    assert int((last_used >= 0).sum()) == len(used_rows) > 4
    for row in used_rows:
        (index,) = ((ids == old_ids[row]) & (last_used >= 0)).nonzero().flatten().tolist()
        assert last_used[index] == old_used[row] and scores[index] == old_scores[row]
        assert torch.equal(state["user"][index], old["user"][row])
        assert torch.equal(state[moment][index], old[moment][row])
    free = [*(last_used < 0).nonzero().flatten().tolist(), *range(len(last_used), 299)]
    assert torch.equal(state["user"][free], fresh["user"][free])
    assert not state[moment][free].any()
    assert torch.equal(state["user"][299], old["user"][11])


# Content


def with_clip(config: Config) -> None:
    assert isinstance(config.content, ContentSettings)
    config.content.modalities["clip"] = ModalitySettings("feature", "clip")


def test_an_added_modality_has_initial_values_and_all_items_are_encoded(
    multimodal: Path, tmp_path: Path
) -> None:
    skip = ("content.fusion.*", "ranking.*")
    with start(multimodal, tmp_path / "new", change=with_clip, skip=skip) as new:
        state, old = state_of(new.job), stored_state(best_of(multimodal))
        assert_equal(state, old, "model.content.projections.text", "item")
        assert re.search(r"content\.projections\.clip.* +added, with initial", new.text)
        assert re.search(r"memory bank +vectors of 32 .* all items", new.text)
        weight = state["model.content.projections.clip.weight"]
        assert weight.norm(dim=1).max() > 1  # principal components, as in any new run
        assert_bank_is_encoded(new.job, list(range(30)))


@torch.no_grad()
def assert_bank_is_encoded(job: Job, items: list[int]) -> None:
    """The bank has these items as the model encodes them now."""
    content = job.em3.content
    assert content is not None and content.bank is not None and job.store is not None
    job.model.eval()
    expected = content.encode(job.store.gather(np.array(items)))
    torch.testing.assert_close(content.bank.lookup(torch.tensor(items))[0], expected)


def test_items_keep_their_vectors_by_raw_id_and_changed_new_and_gone_ones_are_encoded(
    multimodal: Path, tmp_path: Path
) -> None:
    old_ids = ids_of(multimodal / "data")
    edited, removed, new_item = old_ids[4], old_ids[7], 901
    new_ids = [new_item, *reversed(old_ids)]

    def edit(items: pa.Table) -> pa.Table:
        items = items.filter(pc.field("item") != removed)
        extra = items.slice(0, 1)
        index = items.column_names.index("item")
        extra = extra.set_column(index, "item", pa.array([new_item]))
        argv = [
            "changed words" if raw == edited else text
            for raw, text in zip(items["item"].to_pylist(), items["text"].to_pylist(), strict=True)
        ]
        items = items.set_column(items.column_names.index("text"), "text", pa.array(argv))
        return pa.concat_tables([items, extra])

    data = write_ids(changed(multimodal, tmp_path, lambda _: None), new_ids)
    rewrite(data / "items", edit)
    with start(multimodal, tmp_path / "new", data=data) as new:
        bank, old = state_of(new.job)["bank"], stored_state(best_of(multimodal))["bank"]
        fresh = [new_ids.index(raw) for raw in (edited, removed, new_item)]
        for row, raw in enumerate(new_ids):
            if row not in fresh:
                assert torch.equal(bank[row], old[old_ids.index(raw)]), raw
        assert_bank_is_encoded(new.job, fresh)
        assert not torch.equal(bank[new_ids.index(edited)], old[old_ids.index(edited)])
        assert bank[fresh, -1].tolist() == [new.progress.age + 1] * 3
