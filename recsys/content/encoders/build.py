"""Builds the encoder of a modality, from its kind or from its settings alone."""

from dataclasses import replace

from recsys.config import ModalitySettings
from recsys.content.encoders.base import Encoder, StoredFeatures
from recsys.data.items.kind import ModalityKind, make_kind

__all__ = ["Encoder", "StoredFeatures", "build_encoder"]


def make_encoder(kind: ModalityKind, entry_shape: tuple[int, ...] = ()) -> Encoder:
    """Return a kind's encoder with its identity; another type than Encoder is a ValueError."""
    encoder = kind.encoder(entry_shape)
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"{kind.where}.kind '{kind.modality.kind}' gives a {type(encoder).__name__} as its "
            "encoder; it must be a recsys.content.encoders.base.Encoder"
        )
    if encoder.identity is not None:
        encoder.identity = replace(encoder.identity, preparation=kind.preparation_digest())
    return encoder


def build_encoder(name: str, modality: ModalitySettings, feature_dim: int | None = None) -> Encoder:
    """Return the encoder of one modality without its items, for inspection.

    Example::

        from recsys.config import ModalitySettings
        from recsys.content.encoders.build import build_encoder

        encoder = build_encoder("clip", ModalitySettings("feature", "clip"), feature_dim=6)
        assert encoder.output_dim == 6
    """
    kind = make_kind(f"content.modalities.{name}", modality)
    encoder = kind.encoder(kind.entry_shape if feature_dim is None else (feature_dim,))
    assert isinstance(encoder, Encoder)
    return encoder
