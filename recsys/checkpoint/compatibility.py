"""Check whether a run can continue with another configuration, other data or other ranks."""

import re
from collections.abc import Iterator
from typing import Any

from recsys.config import Config, config_of_plain, content_settings, to_plain

# Settings that a run may change when it continues; all others define the stored tensors.
CHANGEABLE = re.compile(
    r"""
    epochs | validations_per_epoch | patience | patience_share | batch_size | accumulate_steps
    | precision | compile | kernels | tf32 | device | num_workers | cache | on_bad_row
    | log_.* | tracker | callbacks | profile_steps | stall_timeout
    | (metrics | checkpoint | embedding[.](communication | parallel | hardware))[.].*
    | (auxiliary[.].* | contrastive)[.]weight
    | content[.](fusion[.]dropout | history[.]refresh_bank_every_epoch)
    | content[.]modalities[.].*[.](cache_frozen_layers | activation_checkpointing)
    | continual[.](.*passes | keep | late | package.* | .*_seconds | edited_items)
    | embedding[.](.*sharding | prefetch | .*learning_rate | .*weight_decay)
    | embedding[.]tables[.].*[.](kernel | cache_load_factor | init_from[.].*)
    | optimizer[.](.*learning_rate | schedule.* | warmup_steps | decay_steps)
    | optimizer[.](weight_decay | clip_norm | ema_decay)
    | ranking[.](depths | available_from | exclude_seen | row_time | dropout | sequence_dropout)
    """,
    re.VERBOSE,
)

MODALITIES = "content.modalities"  # name under which another order of modalities is reported


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten settings to a dict by full name; settings that are unset or off are left out."""
    if isinstance(value, dict):
        settings: dict[str, Any] = {}
        for name, item in value.items():
            settings |= flattened(item, f"{prefix}.{name}" if prefix else name)
        return settings
    return {} if value is None or value is False or value == [] else {prefix: value}


def differing(stored: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, stored and current value of each entry that differs; None: no such entry."""
    for name in sorted(stored.keys() | current.keys()):
        if stored.get(name) != current.get(name):
            yield name, stored.get(name), current.get(name)


def differing_settings(stored: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, stored and current value of each setting that differs and is not changeable."""
    for name, *values in differing(flattened(to_plain(stored)), flattened(to_plain(config))):
        # Without the loss its head is not in the model.
        adds_head = name == "contrastive.weight" and 0 in values
        if adds_head or not CHANGEABLE.fullmatch(name):
            yield name, values[0], values[1]
    orders = modalities_of(stored), modalities_of(config)
    if orders[0] != orders[1] and set(orders[0]) == set(orders[1]):
        yield MODALITIES, *orders


def modalities_of(config: Config) -> list[str]:
    """Return the modalities in their order, by which fusion and similarities tell them apart."""
    content = content_settings(config.content)
    return [] if content is None else list(content.modalities)


def check_config(stored: dict[str, Any], config: Config, where: str) -> None:
    """Raise a ValueError with the settings that differ from a checkpoint and define its model."""
    if repr(stored) == repr(to_plain(config)):  # compares the order of modalities, too
        return
    changes = [
        f"{name} (checkpoint: {previous}, now: {current})"
        for name, previous, current in differing_settings(config_of_plain(stored), config)
    ]
    if changes:
        raise ValueError(
            f"{where}: written with another configuration; these settings differ: "
            f"{', '.join(changes)}. Set them back, choose another --out, or start anew with "
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
