"""Bad schemas, encoders and configurations: what is broken, and what the error must say."""

import json
from pathlib import Path
from typing import Any

from recsys.content.encoders.pretrained import tiny_model, tiny_tokenizer
from tests.recsys.data.bad_impressions import BadInput, Spoil


def schema(old: str, new: str) -> Spoil:
    """Words of schema.yaml are replaced."""

    def spoil(data: Path) -> None:
        text = (data / "schema.yaml").read_text()
        assert old in text
        (data / "schema.yaml").write_text(text.replace(old, new))

    return spoil


def schema_of(text: bytes) -> Spoil:
    return lambda data: (data / "schema.yaml").write_bytes(text)


def bomb_of_aliases() -> bytes:
    """Nine lists of nine times the list before: 9^9 entries when written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines).encode()


def encoder(spoil: Spoil) -> Spoil:
    """A folder with a tiny text encoder beside the data, spoilt."""

    def make(data: Path) -> None:
        folder = data / "encoder"
        tiny_model("random:bert", "").save_pretrained(folder)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(folder)
        spoil(folder)

    return make


def settings_of(file: str, **changes: Any) -> Spoil:
    """A JSON file of the encoder says something else."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return spoil


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def nothing(_: Path) -> None:
    """The data stay good."""


FOLDER = ("--content.modalities.text.encoder", "DATA/encoder")
LOAD = ["content.modalities.text: ", "'DATA/encoder' "]

SCHEMAS = {
    "no schema": BadInput(lambda data: (data / "schema.yaml").unlink(), ["DATA/schema.yaml: "]),
    "schema that is no YAML": BadInput(schema_of(b"columns: [a"), ["DATA/schema.yaml: "]),
    "schema that is no text": BadInput(schema_of(b"\xff\xfe\x00\xd8"), ["DATA/schema.yaml: "]),
    "schema that grows": BadInput(schema_of(bomb_of_aliases()), ["DATA/schema.yaml: "]),
    "table without a size": BadInput(
        schema("num_embeddings: 10", "num_embeddings: ten"),
        ["DATA/schema.yaml: ", "num_embeddings"],
    ),
    "items table larger than any memory": BadInput(
        schema("num_embeddings: 30", f"num_embeddings: {10**14}"),
        ["memory bank: 100,000,000,000,000 items"],
        (),
    ),
}

ENCODERS = {
    "no such folder": BadInput(nothing, ["encoder folder 'DATA/encoder'"], FOLDER),
    "truncated weights": BadInput(
        encoder(lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 99)),
        LOAD,
        FOLDER,
    ),
    "damaged config": BadInput(
        encoder(lambda folder: (folder / "config.json").write_bytes(b"\xff{")), LOAD, FOLDER
    ),
    "config with values of another type": BadInput(
        encoder(settings_of("config.json", hidden_size="wide")), [*LOAD, "hidden_size"], FOLDER
    ),
    "no tokenizer": BadInput(encoder(without_tokenizer), ["tokenizer of 'DATA/encoder' "], FOLDER),
    "longer texts than the encoder reads": BadInput(
        nothing,
        ["max_length is 9999"],
        ("--content.modalities.text.max_length", "9999"),
    ),
    "images of another size": BadInput(
        nothing,
        ["image_size is 48"],
        (
            "--content.modalities",
            "{p: {kind: image, column: poster, encoder: 'random:vit', image_size: 48}}",
        ),
    ),
    "more layers to adapt than there are": BadInput(
        nothing,
        ["top_layers is 4"],
        ("--content.modalities.text.lora.top_layers", "4"),
    ),
}

SETTINGS = {
    "width that the kernels cannot do": ("--embedding.dim=7", "embedding_dim is 7"),
    "modality of a number": ("--content.modalities={1: {kind: feature, column: clip}}", "1 is"),
    "pixels of a slip": (
        "--content.modalities={p: {kind: image, column: poster, image_size: 10000000}}",
        "image_size is 10000000",
    ),
    "package outside": (
        "--content.modalities={t: {kind: text, column: text, encoder: 'package:../x'}}",
        "'../x'",
    ),
    "width of a slip": ("--contrastive.dim=1000000000000", "contrastive.dim is 1000000000000"),
    "layers of a slip": ("--ranking.cross_layers=1000000", "ranking.cross_layers is 1000000"),
    "table of no width": ("--embedding.tables.item.embedding_dim=0", "embedding.tables.item"),
    "negative rate of one table": (
        "--embedding.tables.item.learning_rate=-1",
        "embedding.tables.item.learning_rate is -1",
    ),
    "table that does not exist": (
        "--embedding.tables.film.learning_rate=1",
        "embedding.tables.film",
    ),
    "weight of a label that does not exist": (
        "--ranking.label_weights.sold=1",
        "no label ['sold']",
    ),
    "NaN as weight of a label": (
        "--ranking.label_weights.liked=.nan",
        "label_weights.liked is nan",
    ),
    "unknown fusion": ("--content.fusion.name=former", "former"),
    "factory that does not exist": (
        "--content.modalities={p: {kind: image, column: poster, module: 'no.such:thing'}}",
        "no.such:thing",
    ),
}
