"""The store through which the ranks of one attempt of a job find each other.

torchrun keeps one store for all restarts of a job, and nothing distinguishes the attempts: gloo and
NCCL then read addresses of ranks that have ended and wait for them in vain
(https://github.com/pytorch/pytorch/issues/135712; the number of restarts differs between nodes, so
it cannot serve as a name). So rank 0 of each attempt chooses a random name, which the other ranks
of the attempt confirm, and all keys are stored under that name.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.02


def attempt_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the store of this attempt, this rank and the number of ranks, by the environment.

    Raises:
        TimeoutError: some ranks did not join in time.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        name = name_attempt(store, rank, world_size, timeout)
        store = dist.PrefixStore(f"attempt_{name}", store)
    return store, rank, world_size


def name_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree on a name with all ranks running now, although the store has keys of earlier attempts.

    Every rank writes a random word. Rank 0 answers each word with its own, which is the name, until
    all have confirmed it. No rank reads the answer to an old word; an answer is replaced when a
    running rank writes its word.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if rank > 0:
        store.set(f"join/word/{rank}", word)
        while True:
            answer = _read(store, f"join/answer/{rank}")
            if answer.startswith(word):
                name = answer.removeprefix(word)
                store.set(f"join/confirmed/{rank}", name)
                return name
            _wait(deadline, "rank 0 did not come")
    missing = set(range(1, world_size))
    answered: dict[int, str] = {}
    while missing:
        for other in sorted(missing):
            spoken = _read(store, f"join/word/{other}")
            if spoken and answered.get(other) != spoken:
                store.set(f"join/answer/{other}", spoken + word)
                answered[other] = spoken
            if _read(store, f"join/confirmed/{other}") == word:
                missing.remove(other)
        if missing:
            _wait(deadline, f"ranks {sorted(missing)} did not come")
    return word


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(complaint)
    time.sleep(POLL_SECONDS)
