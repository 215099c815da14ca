"""Chooses the settings of a peer by Optuna, on validation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import optuna

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.trainings import PeerTraining, digest_of
from recsys.evaluation.bootstrap import pooled_metric

METRICS = ("auc", "gauc")


def tuned(peer: Peer, windows: list[Path], trials: int, out: Path) -> dict[str, Any]:
    """Return the settings with the highest mean of AUC and GAUC of validation, pooled.

    A study that was stopped goes on.

    Args:
        peer: whose settings are chosen.
        windows: folders of the rows.
        trials: trainings on all windows.
        out: folder of trainings and studies.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {of: repr(values) for of, values in peer.space.items()}
    name = f"{re.sub(r'[^a-z0-9]+', '_', peer.name.lower())}-{digest_of(peer, windows, space)}"
    file = out / "studies" / f"{name}.sqlite"
    file.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{file}",
        study_name=name,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        load_if_exists=True,
    )
    while len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < trials:
        trial = study.ask(dict(peer.space))
        trainings = [PeerTraining(peer, rows, trial.params, 0, out) for rows in windows]
        study.tell(trial, _value(trainings))
    print(f"{peer.name}: {study.best_value:.4f} by {json.dumps(study.best_params)}", flush=True)
    return study.best_params


def _value(trainings: list[PeerTraining]) -> float:
    """Return the objective of settings that were trained on each window."""
    scores = [training.scores("valid") for training in trainings]
    values = [pooled_metric(scores, metric, "all") or 0.0 for metric in METRICS]
    return sum(values) / len(values)
