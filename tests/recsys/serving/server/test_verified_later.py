"""`--verify later`: a damage that is seen while the package is served ends its answers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from recsys.config.server import Limits, ServerSettings
from recsys.serving.server.engine import Engine
from recsys.serving.server.http_app import http_app
from recsys.serving.server.refusals import Damaged


@asynccontextmanager
async def _nothing(_):
    yield


def test_a_damage_that_is_seen_later_makes_the_server_not_ready(
    package_run: tuple[Path, Path, np.ndarray],
) -> None:
    package = str(package_run[1])
    settings = ServerSettings(package, "shop", "", 0, 0, 1, 1, Limits(), verify="later")
    engine = Engine(settings)
    check = engine.served.scorer.check
    assert check is not None
    check.join()
    client = TestClient(http_app(engine, _nothing))
    assert check.difference is None and client.get("/v2/health/ready").status_code == 200

    check.difference = "graph.pt2: its content differs"

    for path in ("/v2/health/ready", "/v2/models/shop/ready", "/v2/models/shop"):
        answer = client.get(path)
        assert answer.status_code == 503 and "graph.pt2" in answer.json()["error"]
    with pytest.raises(Damaged, match=r"graph\.pt2"):
        engine.require_model("shop", None)
