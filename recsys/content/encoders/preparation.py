"""How the input of an encoder is prepared, as its checkpoint says: tokenizer, pixels.

An encoder knows only input that was prepared as in its own training, so this comes from the files
beside its weights (`tokenizer.json`, `preprocessor_config.json`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from recsys.config import ModalitySettings
from recsys.content.encoders.identity import tokenizer_digest
from recsys.content.encoders.pretrained import explained, model_config, resolve_encoder
from recsys.content.encoders.tiny_encoders import tiny_model, tiny_tokenizer
from recsys.data.items.images import ImagePreparation
from recsys.data.items.item_table import digest_of

NO_IMAGE_FILE = (
    "has no preprocessor_config.json, so its images are cut to squares and normalised as those of "
    "ImageNet; add that file if it was trained otherwise"
)


@dataclass(frozen=True)
class Preparation:
    """What is done to the texts or images of a modality before its encoder sees them.

    Attributes:
        tokenizer: of texts.
        fills_texts: whether short texts are filled up to the longest with padding that is read.
        images: of images.
        notes: what the user should know, each a sentence.
    """

    tokenizer: Any = None
    fills_texts: bool = False
    images: ImagePreparation = field(default_factory=ImagePreparation)
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        if self.tokenizer is None:
            return digest_of(self.images)
        return digest_of(tokenizer_digest(self.tokenizer), self.fills_texts)


def load_preparation(modality: ModalitySettings, where: str) -> Preparation:
    """What the checkpoint of a modality's encoder says; nothing for stored features.

    Raises:
        ValueError: its files cannot be used.
    """
    name, revision = modality.encoder, modality.revision
    if name is None:
        return Preparation()
    if modality.kind == "text":
        tokenizer = load_tokenizer(name, revision, where)
        is_random = name.startswith("random:")
        source = name if is_random else resolve_encoder(name, where)
        config = tiny_model(name, where).config if is_random else model_config(source, revision)
        return Preparation(tokenizer, fills_texts=reads_whole_texts(config))
    images, note = load_image_preparation(name, revision, where)
    return Preparation(images=images, notes=[] if note is None else [note])


def reads_whole_texts(config: Any) -> bool:
    """Whether an encoder was trained on texts filled up to one length, padding read like words.

    So was SigLIP (arXiv 2303.15343), which pools at the last place.
    """
    return config.model_type.startswith("siglip")


def load_tokenizer(name: str, revision: str | None, where: str) -> Any:
    """The tokenizer of an encoder.

    Raises:
        ValueError: it cannot be loaded, or has no words, or more than the encoder knows.
    """
    if name.startswith("random:"):
        return tiny_tokenizer()
    source = resolve_encoder(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        num_embeddings = model_config(source, revision).get_text_config().vocab_size
    except Exception as error:
        raise ValueError(
            f"{where}: tokenizer of '{name}' cannot be loaded: {explained(error)}"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_ids):  # made up where its files are missing
        raise ValueError(f"{where}: tokenizer of '{name}' has no vocabulary; add tokenizer.json")
    if max(vocabulary.values()) >= num_embeddings:
        raise ValueError(
            f"{where}: tokenizer of '{name}' has ids up to {max(vocabulary.values())}, the encoder "
            f"embeds {num_embeddings}; they are of different models"
        )
    return tokenizer


def load_image_preparation(
    name: str, revision: str | None, where: str
) -> tuple[ImagePreparation, str | None]:
    """What is done to images, and what the user should know of it.

    Raises:
        ValueError: the checkpoint's file cannot be used.
    """
    if name.startswith("random:"):
        return ImagePreparation(), None
    source = resolve_encoder(name, where)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError:
        return ImagePreparation(), f"{where}: encoder '{name}' {NO_IMAGE_FILE}"
    try:
        return _image_preparation(settings), None
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{where}: preprocessor_config.json of '{name}' cannot be used ({error!r})"
        ) from error


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
