"""A run that was begun from another one and stopped goes on as any other, with the same bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.checkpoint.warm_start.source import WarmStart
from recsys.distributed.lockstep import TrainingStopped
from recsys.distributed.ranks import joined_ranks
from recsys.training.train import train
from tests.recsys.checkpoint.stopped_runs import StepsSeen
from tests.recsys.checkpoint.warm_start.warm_runs import (
    WITHOUT_CONTENT,
    changed,
    config_of,
    grow,
    ids_of,
    last_of,
    stored_state,
    write_ids,
)


@pytest.mark.long
def test_a_warm_started_run_that_was_stopped_ends_with_the_same_bits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_ids(changed(plain, tmp_path, grow), [901, *reversed(ids_of(plain / "data"))])
    fitted = data / "transforms.yaml"  # fitted anew, which is not read
    fitted.write_text(re.sub(r"mean: [^,}]+", "mean: 7.5", fitted.read_text()))
    assert "7.5" in fitted.read_text()
    request = WarmStart(plain / "run")

    def run(name: str, **arguments: Any) -> Path:
        with joined_ranks("cpu") as ranks:
            config = config_of(plain, *WITHOUT_CONTENT)
            train(config, str(data), tmp_path / name / "run", ranks, **arguments)
        return tmp_path / name

    whole = run("whole", warm_start=request)
    steps_seen = StepsSeen(monkeypatch, stop_after=2)
    with pytest.raises(TrainingStopped):
        run("stopped", warm_start=request)
    assert [step for step, _ in steps_seen.steps][:2] == [1, 2]  # those of the new run
    with pytest.raises(ValueError, match=r"warm_start\.json"):
        run("stopped", warm_start=WarmStart(plain / "run", optimizer=False))
    stopped = run("stopped", warm_start=request)
    one, two = stored_state(last_of(whole)), stored_state(last_of(stopped))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    progress = json.loads((last_of(stopped) / "checkpoint.json").read_text())["progress"]
    assert (progress["steps"], progress["steps_before"]) == (4, 8)
    # The ids of the bounded vocabulary were last used in the steps that follow those of the run.
    assert two["vocabulary.user.last_used"].max() == 11
