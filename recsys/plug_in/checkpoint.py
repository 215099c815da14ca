"""Loads a checkpoint of a DLRM into the DLRM with content, and saves one.

Tensors are shared with the model or the optimizer, whole or sharded: loading into them loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from recsys.plug_in.model import new_prefixes


def dlrm_state(
    model: nn.Module, optimizer: KeyedOptimizer | None = None
) -> dict[str, dict[str, Any]]:
    """Return the content of a checkpoint of the DLRM alone: {"model": ..., "optimizer": ...}.

    To load, create the optimizer's state (`init_state`), pass the result to
    `torch.distributed.checkpoint.load` and then to `load_dlrm`. An optimizer without state, such as
    plain SGD, is left out.

    Example::

        from recsys.plug_in import add_content, dlrm_state, load_dlrm

        model = add_content(dlrm, "content.yaml", device)
        state = dlrm_state(model)  # torch.distributed.checkpoint.load(state, ...) fills it
        assert state["model"].keys() == dlrm.state_dict().keys()
        load_dlrm(model, state)
    """
    new = new_prefixes(model)
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(new)}
    moments = optimizer.state_dict()["state"] if optimizer is not None else {}
    moments = {key: value for key, value in moments.items() if value and not key.startswith(new)}
    return {"model": weights} | ({"optimizer": {"state": moments}} if moments else {})


def load_dlrm(
    model: nn.Module,
    state: Mapping[str, Mapping[str, Any]],
    optimizer: KeyedOptimizer | None = None,
) -> None:
    """Load a DLRM's checkpoint; the content parameters do not change.

    `state` is {"model": ..., "optimizer": ...}, as `dlrm_state` returns it.

    Raises:
        ValueError: the state is not that of this DLRM, with the first name that differs.

    Example::

        from recsys.plug_in import add_content, load_dlrm

        model = add_content(dlrm, "content.yaml", device)
        load_dlrm(model, {"model": dlrm.state_dict()})
    """
    current = dlrm_state(model, optimizer)
    _check_names(current["model"], state["model"], "model")
    model.load_state_dict({**model.state_dict(), **state["model"]})
    if optimizer is not None:
        empty: dict[str, Any] = {"state": {}}
        loaded = state.get("optimizer", empty)["state"]
        loaded = {key: value for key, value in loaded.items() if value}
        _check_names(current.get("optimizer", empty)["state"], loaded, "optimizer")
        moments = optimizer.state_dict()
        moments["state"] = {**moments["state"], **loaded}
        optimizer.load_state_dict(moments)


def _check_names(expected: Mapping[str, Any], loaded: Mapping[str, Any], part: str) -> None:
    """Raise a ValueError for the first name that only one of both states has."""
    for name in sorted(expected.keys() ^ loaded.keys()):
        place = "this DLRM" if name in expected else "the checkpoint"
        raise ValueError(
            f"{part} state '{name}' is only in {place}; a checkpoint fits the DLRM it was written "
            "by, and an optimizer that has state (`optimizer.init_state()`)"
        )
