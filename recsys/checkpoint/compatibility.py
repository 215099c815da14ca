"""Check whether a run can continue with another configuration, other data or other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from recsys.config import Config, config_of_plain, to_plain
from recsys.ranking.settings import NumbersSettings

# Settings that may change between a checkpoint and the run that continues it: length and speed of
# training, distribution of the work, reports. All others define the stored tensors.
CHANGEABLE = (
    "epochs",
    "validations_per_epoch",
    "patience",
    "batch_size",
    "accumulate_steps",
    "precision",
    "compile",
    "kernels",
    "num_workers",
    "device",
    "cache",
    "log_*",
    "tracker",
    "tf32",
    "metrics.*",
    "auxiliary.*.weight",
    "profile_steps",
    "stall_timeout",
    "on_bad_row",
    "checkpoint.*",
    "continual.*passes",
    "continual.keep",
    "continual.late",
    "continual.package*",
    "continual.*_seconds",
    "continual.edited_items",
    "optimizer.*learning_rate",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.schedule*",
    "optimizer.decay_steps",
    "optimizer.clip_norm",
    "optimizer.ema_decay",
    "embedding.*sharding",
    "embedding.communication.*",
    "embedding.prefetch",
    "embedding.parallel.*",
    "embedding.*learning_rate",
    "embedding.*weight_decay",
    "embedding.tables.*.kernel",
    "embedding.tables.*.cache_load_factor",
    "embedding.tables.*.init_from.*",
    "content.modalities.*.cache_frozen_layers",
    "content.modalities.*.activation_checkpointing",
    "content.history.refresh_bank_every_epoch",
    "ranking.dropout",
    "content.fusion.dropout",
    "contrastive.weight",
)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten settings to a dict by full name; settings that are unset or off are left out."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for name, part in value.items():
            found |= flattened(part, f"{prefix}.{name}" if prefix else name)
        return found
    return {} if value is None or value is False or value == [] else {prefix: value}


def differing_settings(stored: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, stored and present value of each setting that differs and is not changeable."""
    before, now = flattened(to_plain(stored)), flattened(to_plain(config))
    for name in sorted(before.keys() | now.keys()):
        values = before.get(name), now.get(name)
        if values[0] == values[1]:
            continue
        # Without the loss its head is not in the model.
        is_of_head = name == "contrastive.weight" and 0 in values
        if is_of_head or not any(fnmatch(name, pattern) for pattern in CHANGEABLE):
            yield name, *values


def with_automatic(config: Config, stored: Config) -> Config:
    """Return the settings of a run that goes on or begins with another one.

    The number of groups of votes is that of the run, unless it has no votes or another is set.
    """
    now, before = config.ranking, stored.ranking
    if not isinstance(now, NumbersSettings) or not isinstance(before, NumbersSettings):
        return config
    adds_votes = now.opinions is not None and before.opinions is None
    if now.opinion_groups is not None or adds_votes:
        return config
    return replace(config, ranking=replace(now, opinion_groups=before.opinion_groups))


def check_config(stored: dict[str, Any], config: Config, where: str) -> None:
    """Refuse to continue from a checkpoint of another model.

    Settings that earlier versions did not have are compared by their defaults.

    Raises:
        ValueError: names every setting that differs and must not.
    """
    if stored == to_plain(config):
        return
    differing = [
        f"{name} (checkpoint: {before}, now: {now})"
        for name, before, now in differing_settings(config_of_plain(stored), config)
    ]
    if differing:
        raise ValueError(
            f"{where}: written with another configuration; these settings differ: "
            f"{', '.join(differing)}. Set them back, choose another --out, or start anew with "
            "--overwrite true"
        )


def check_equal(name: str, stored: Any, now: Any, where: str) -> None:
    """Refuse to continue if something besides the configuration has changed.

    Raises:
        ValueError: `stored` and `now` differ.
    """
    if stored != now:
        raise ValueError(
            f"{where}: {name} changed since it was written (then {stored}, now {now}), so its "
            "position and weights mean nothing; bring them back, choose another --out, or start "
            "anew with --overwrite true"
        )
