"""What is wrong with a configuration that names and types alone do not show.

Values out of range, dimensions that do not divide and settings that exclude each other are told
by their full name before anything is built.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from recsys.config.named_parts import find_part

if TYPE_CHECKING:
    from recsys.config import (
        Config,
        ContentSettings,
        LoraSettings,
        ModalitySettings,
        RankingSettings,
    )

HAVE_ENSEMBLES = ("din_dcn", "din", "sim")
HAVE_STANDARDIZATION = (*HAVE_ENSEMBLES, "mmoe")
LORA_INITS = ("gaussian", "orthogonal", "olora", "pissa")


def validate(config: Config) -> None:
    """Checks what spans several settings.

    Raises:
        ValueError: names the settings that do not fit and what would.
    """
    at_least_one = ["batch_size", "epochs", "validations_per_epoch", "patience", "log_every_steps"]
    at_least_one += ["embedding.dim", "contrastive.dim", "contrastive.num_negatives"]
    at_least_one += ["checkpoint.keep", "accumulate_steps"]
    for name in at_least_one:
        _at_least(config, name, 1)
    for name in ["every_steps", "every_seconds"]:
        if getattr(config.checkpoint, name) is not None:
            _at_least(config, f"checkpoint.{name}", 1)
    for name in [
        "num_workers",
        "profile_steps",
        "stall_timeout",
        "optimizer.warmup_steps",
        "ranking.cross_layers",
    ]:
        _at_least(config, name, 0)
    rates = ["learning_rate", "content_learning_rate", "encoder_learning_rate", "weight_decay"]
    for name in [f"optimizer.{rate}" for rate in rates]:
        _at_least(config, name, 0)
    for name in ["learning_rate", "weight_decay", "init_std"]:
        _at_least(config, f"embedding.{name}", 0)
    _at_least(config, "contrastive.weight", 0)
    _dropout(config, "ranking.dropout")
    _validate_ranking(config)
    for name, table in config.embedding.tables.items():
        if table.embedding_dim is not None:
            _at_least(config, f"embedding.tables.{name}.embedding_dim", 1)
        _dropout(config, f"embedding.tables.{name}.id_dropout")
    if config.content == "none":
        return
    _validate_content(config, config.content)
    temperature = config.contrastive.temperature
    if config.contrastive.weight > 0 and not 0 < temperature < math.inf:
        raise ValueError(f"contrastive.temperature is {temperature}; it must be > 0 and finite")


def _validate_ranking(config: Config) -> None:
    counts = ["ensemble_members", "num_experts", "search_top_k", "search_heads", "tower_dim"]
    for name in [*counts, "num_negatives"]:
        _at_least(config, f"ranking.{name}", 1)
    _validate_parts(config.ranking)
    temperature = config.ranking.temperature
    if not 0 < temperature < math.inf:
        raise ValueError(f"ranking.temperature is {temperature}; it must be > 0 and finite")
    _validate_retrieval(config)
    for name in ("attention_units", "dense_units", "mlp_units"):
        units = getattr(config.ranking, name)
        if any(unit < 1 for unit in units):
            raise ValueError(f"ranking.{name} is {units}; each layer has at least 1 unit")
    for label, weight in config.ranking.label_weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"ranking.label_weights.{label} is {weight}; it must be at least 0 and finite"
            )


def _validate_parts(ranking: RankingSettings) -> None:
    """Parts that not every ranking model has; one of the user's own may have them."""
    wanted = {
        "ensemble_members": (ranking.ensemble_members > 1, HAVE_ENSEMBLES, "1"),
        "standardize_numbers": (ranking.standardize_numbers, HAVE_STANDARDIZATION, "false"),
    }
    for name, (is_wanted, models, off) in wanted.items():
        if is_wanted and ranking.name not in models and ":" not in ranking.name:
            raise ValueError(
                f"ranking.{name} is for {', '.join(models)}, which '{ranking.name}' is not; choose "
                f"one of them as ranking.name, or set it to {off}"
            )


def _validate_retrieval(config: Config) -> None:
    ranking, content = config.ranking, config.content
    is_own = ":" in ranking.name
    if ranking.options and not is_own:
        raise ValueError(
            f"ranking.options are for a class of your own, but ranking.name is '{ranking.name}'; "
            "remove them"
        )
    if ranking.loss == "pointwise":
        return
    if ranking.name != "two_tower" and not is_own:
        raise ValueError(
            f"ranking.loss {ranking.loss} compares vectors of users and items, which "
            f"'{ranking.name}' has not; choose ranking.name two_tower, or pointwise"
        )
    if ranking.loss == "sampled_softmax" and content != "none" and content.history.mode == "full":
        raise ValueError(
            "ranking.loss sampled_softmax reads the content of its negatives from the memory bank, "
            "which content.history.mode full has not; choose bank_lora, bank_frozen or bank_dense"
        )


def _setting(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _at_least(config: Config, name: str, least: int) -> None:
    value = _setting(config, name)
    if not least <= value < math.inf:  # NaN is refused too
        finite = " and finite" if isinstance(value, float) else ""
        raise ValueError(f"{name} is {value}; it must be at least {least}{finite}")


def _dropout(config: Config, name: str) -> None:
    value = _setting(config, name)
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; a dropout lies in [0, 1)")


def _validate_content(config: Config, content: ContentSettings) -> None:
    if not content.modalities:
        raise ValueError(
            "content.modalities is empty: name at least one modality, or set `content: none`"
        )
    for name in ["dim", "fusion.num_queries", "fusion.num_layers", "fusion.num_heads"]:
        _at_least(config, f"content.{name}", 1)
    for name in ["simtier_bins", "sorted_cosines", "top_k"]:
        _at_least(config, f"content.history.{name}", 0)
    _validate_sampling(content)
    _dropout(config, "content.fusion.dropout")
    fusion = content.fusion
    if fusion.name == "qformer" and content.dim % fusion.num_heads:
        raise ValueError(
            f"content.dim {content.dim} is not divisible by content.fusion.num_heads "
            f"{fusion.num_heads}; choose a multiple"
        )
    if content.history.mode == "bank_lora" and not 0 < content.history.lora_rank <= content.dim:
        raise ValueError(
            f"content.history.lora_rank is {content.history.lora_rank}; it must lie in "
            f"[1, content.dim = {content.dim}]"
        )
    for name, modality in content.modalities.items():
        _validate_modality(f"content.modalities.{name}", modality)
        if modality.training == "lora":
            _at_least(config, f"content.modalities.{name}.lora.rank", 1)
            _at_least(config, f"content.modalities.{name}.lora.top_layers", 1)
            _dropout(config, f"content.modalities.{name}.lora.dropout")
            _validate_lora(f"content.modalities.{name}.lora", modality.lora)


def _validate_sampling(content: ContentSettings) -> None:
    forward, backward = content.sampling.forward, content.sampling.backward
    if not 0 < backward <= forward <= 1:
        raise ValueError(
            f"content.sampling.forward is {forward} and content.sampling.backward {backward}; "
            "shares must hold 0 < backward <= forward <= 1"
        )
    for name, is_set in [
        ("sampling.forward", forward < 1),
        ("sampling.backward", backward < 1),
        ("history.top_k", content.history.top_k > 0),
    ]:
        if is_set and content.history.mode == "full":
            raise ValueError(
                f"content.{name} reads the memory bank, which content.history.mode full has not; "
                "choose bank_lora, bank_frozen or bank_dense"
            )


def _validate_modality(where: str, modality: ModalitySettings) -> None:
    make_kind = find_part(f"{where}.kind", "recsys.data.items.kind:make_kind", {})
    make_kind(where, modality)  # which checks the settings of its kind
    if modality.module and modality.training == "lora":
        raise ValueError(
            f"{where}: LoRA needs a transformers `encoder`; a `module` is frozen or full"
        )
    if min(modality.max_length, modality.image_size, modality.max_images) < 1:
        raise ValueError(f"{where}: max_length, image_size and max_images must be at least 1")
    if modality.activation_checkpointing and (
        modality.training == "frozen" or not modality.encoder
    ):
        raise ValueError(
            f"{where}: activation_checkpointing is for the trained layers of a transformers "
            "`encoder`; set `training: lora` or `full`, or remove it"
        )


def _validate_lora(where: str, lora: LoraSettings) -> None:
    layers = lora.layers
    if layers is not None and (len(layers) != 2 or not 0 <= layers[0] <= layers[1]):
        raise ValueError(
            f"{where}.layers is {layers}; give the first and the last adapted layer, counted from "
            "0, such as [2, 5]"
        )
    init = lora.init_lora_weights
    if isinstance(init, str) and init not in LORA_INITS and not init.startswith("pissa_niter_"):
        raise ValueError(
            f"{where}.init_lora_weights is '{init}'; choose true, false, {', '.join(LORA_INITS)} "
            "or pissa_niter_N (others of peft need data of their own)"
        )
