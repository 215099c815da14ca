"""Check whether a run can continue with another configuration, other data or other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from recsys.config import Config, config_of_plain, to_plain

# Settings that a run may change when it continues; all others define the stored tensors.
CHANGEABLE = (
    "epochs",
    "validations_per_epoch",
    "patience",
    "patience_share",
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
    "callbacks",
    "ranking.depths",
    "ranking.available_from",
    "ranking.exclude_seen",
    "ranking.row_time",
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
    "embedding.hardware.*",
    "embedding.*learning_rate",
    "embedding.*weight_decay",
    "embedding.tables.*.kernel",
    "embedding.tables.*.cache_load_factor",
    "embedding.tables.*.init_from.*",
    "content.modalities.*.cache_frozen_layers",
    "content.modalities.*.activation_checkpointing",
    "content.history.refresh_bank_every_epoch",
    "ranking.dropout",
    "ranking.sequence_dropout",
    "content.fusion.dropout",
    "contrastive.weight",
)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten settings to a dict by full name; settings that are unset or off are left out."""
    if isinstance(value, dict):
        settings: dict[str, Any] = {}
        for name, part in value.items():
            settings |= flattened(part, f"{prefix}.{name}" if prefix else name)
        return settings
    return {} if value is None or value is False or value == [] else {prefix: value}


def differing_settings(stored: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, stored and present value of each setting that differs and is not changeable."""
    previous, current = flattened(to_plain(stored)), flattened(to_plain(config))
    for name in sorted(previous.keys() | current.keys()):
        values = previous.get(name), current.get(name)
        if values[0] == values[1]:
            continue
        # Without the loss its head is not in the model.
        adds_head = name == "contrastive.weight" and 0 in values
        if adds_head or not any(fnmatch(name, pattern) for pattern in CHANGEABLE):
            yield name, *values


def check_config(stored: dict[str, Any], config: Config, where: str) -> None:
    """Raise a ValueError that names the settings in which a checkpoint is of another model."""
    if stored == to_plain(config):
        return
    differing = [
        f"{name} (checkpoint: {previous}, now: {current})"
        for name, previous, current in differing_settings(config_of_plain(stored), config)
    ]
    if differing:
        raise ValueError(
            f"{where}: written with another configuration; these settings differ: "
            f"{', '.join(differing)}. Set them back, choose another --out, or start anew with "
            "--overwrite"
        )


def check_equal(name: str, stored: Any, current: Any, where: str) -> None:
    """Raise a ValueError if something besides the configuration has changed."""
    if stored != current:
        raise ValueError(
            f"{where}: {name} changed since it was written (then {stored}, now {current}), so its "
            "position and weights mean nothing; bring them back, choose another --out, or start "
            "anew with --overwrite"
        )
