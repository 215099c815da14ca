"""A package of a trained run gives the numbers of `recsys predict`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from recsys.distributed.ranks import joined_ranks
from recsys.serving import Scorer
from recsys.serving.export import export_run
from tests.recsys.serving.serving_runs import exported, requests, small_config

ALONE = """
import json, sys
import torch.distributed as dist

def refuse(*arguments, **named):
    raise AssertionError("a scorer joined a process group")

dist.init_process_group = dist.new_group = refuse
from recsys.serving import Scorer

request = json.load(open(sys.argv[1] + "/request.json"))
print(json.dumps(Scorer.load(sys.argv[1]).score(**request).tolist()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """The folder of dataset and run, the package, and the predictions of the test rows."""
    folder = tmp_path_factory.mktemp("served")
    return folder, *exported(folder, small_config(folder))


@pytest.fixture(scope="module")
def scorer(run: tuple[Path, Path, np.ndarray]) -> Scorer:
    return Scorer.load(run[1])


def test_scores_equal_those_of_predict(run: tuple[Path, Path, np.ndarray], scorer: Scorer) -> None:
    scores = [scorer.score(**request) for request in requests(run[0] / "data")]

    np.testing.assert_allclose(np.concatenate(scores), run[2], rtol=0, atol=1e-6)


def test_candidates_scored_together_equal_one_by_one(
    run: tuple[Path, Path, np.ndarray], scorer: Scorer
) -> None:
    request = next(requests(run[0] / "data"))
    items = list(range(30))

    together = scorer.score(request["user"], request["history"], items)

    alone = [scorer.score(request["user"], request["history"], [item]) for item in items]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-6)


def test_a_process_without_a_process_group_scores(run: tuple[Path, Path, np.ndarray]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(run[1])], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), run[2][:1], rtol=0, atol=1e-6)


def test_threads_share_a_scorer(run: tuple[Path, Path, np.ndarray], scorer: Scorer) -> None:
    given = list(requests(run[0] / "data"))
    scores: dict[int, np.ndarray] = {}

    def answer(number: int) -> None:
        scores[number] = np.concatenate([scorer.score(**request) for request in given])

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number in range(4):
        np.testing.assert_allclose(scores[number], run[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tables", "error"), [("fp16", 1e-3), ("int8", 0.02)])
def test_smaller_tables_change_scores_little(
    run: tuple[Path, Path, np.ndarray], tables: str, error: float
) -> None:
    package = run[0] / f"package_{tables}"
    with joined_ranks("cpu") as ranks:
        export_run(run[0] / "run", package, tables, ranks)  # type: ignore[arg-type]
    small = Scorer.load(package)

    scores = [small.score(**request) for request in requests(run[0] / "data")]

    np.testing.assert_allclose(np.concatenate(scores), run[2], rtol=0, atol=error)


def test_no_candidates_give_no_scores(run: tuple[Path, Path, np.ndarray], scorer: Scorer) -> None:
    request = next(requests(run[0] / "data"))

    assert scorer.score(request["user"], request["history"], []).shape == (0, 1)


def test_a_package_that_exists_is_not_replaced(run: tuple[Path, Path, np.ndarray]) -> None:
    with joined_ranks("cpu") as ranks, pytest.raises(ValueError, match=str(run[1])):
        export_run(run[0] / "run", run[1], "fp32", ranks)
