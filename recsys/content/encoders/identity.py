"""Identifies the encoders that a run was trained with: revision, weights, treatment of input.

Frozen weights are in no checkpoint: `encoders.json` of a run says which encoders it needs.
"""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from recsys.data.items.item_table import digest_of
from recsys.storage.files import atomic_write

FILE = "encoders.json"
# Covers the differences between tokenizers: case, accents, scripts, numbers, punctuation, emoji.
SAMPLE_TEXT = "The quick Brown fox, naïve café №1234! 你好 Привет 🙂 re-use\tend."


@dataclass(frozen=True)
class EncoderIdentity:
    """Identity of an encoder when it was loaded."""

    name: str
    revision: str | None  # commit of the hub repository, if it comes from the hub
    weights: str  # their hash
    preparation: str = ""  # hash of the tokenizer or the treatment of pixels; empty for inspection


def weights_digest(module: nn.Module, excluded: Container[str] = ()) -> str:
    """Return a hash of all weights but those of adapters, which each run initialises anew."""
    chunks: list[Any] = []
    for name, tensor in module.state_dict().items():
        if "lora_" not in name and name not in excluded:
            # peft renames a frozen layer to base_layer when it adds an adapter.
            values = tensor.detach().cpu().contiguous()
            chunks += [name.replace(".base_layer", ""), memoryview(values.numpy().tobytes())]
    return digest_of(*chunks)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's behaviour, independent of its library's version."""
    ids = tokenizer(SAMPLE_TEXT)["input_ids"]
    return digest_of(sorted(tokenizer.get_vocab().items()), ids)


def write_identities(identities: dict[str, EncoderIdentity], run: Path) -> None:
    """Write the identities of a run's encoders, by modality, to its folder."""
    plain = {name: asdict(identity) for name, identity in identities.items()}
    atomic_write(run / FILE, json.dumps(plain, indent=1) + "\n")


def check_identities(identities: dict[str, EncoderIdentity], run: Path) -> None:
    """Raise a ValueError unless encoders are those that the run was trained with."""
    file = run / FILE
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it says which encoders the run was trained with")
    for name, identity in identities.items():
        try:
            stored = EncoderIdentity(**json.loads(file.read_text())[name])
            if not (isinstance(stored.weights, str) and isinstance(stored.preparation, str)):
                raise TypeError("a hash is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{file}: the identity of content.modalities.{name} is missing or damaged ({error}"
                "); bring the file back, or train anew"
            ) from error
        keys = ("weights", "preparation")
        differing = [key for key in keys if getattr(stored, key) != getattr(identity, key)]
        if differing:
            fix = f"Set content.modalities.{name}.revision to {stored.revision}"
            fix = fix if stored.revision else "Bring its files back"
            raise ValueError(
                f"{file}: the run was trained with encoder {_described(stored)} for "
                f"content.modalities.{name}; now it is {_described(identity)}, of other "
                f"{' and '.join(differing)}. {fix}, or train anew"
            )


def _described(identity: EncoderIdentity) -> str:
    revision = f" at revision {identity.revision}" if identity.revision else ""
    return f"'{identity.name}'{revision} (weights {identity.weights[:8]})"
