"""Settings of a DLRM's content: the items' files, the features with their ids, and the branch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recsys.config import Config, ContentSettings, ContrastiveSettings, OptimizerSettings
from recsys.config.limits import NonNegativeFloat
from recsys.config.load import validate
from recsys.config.parser import settings_of
from recsys.config.plain_yaml import load_plain_yaml
from recsys.data.items.kind import make_kinds
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, ItemColumn, Items


@dataclass
class ContentRates:
    """AdamW's settings for new parameters, by default those of a run; your schedule scales them."""

    learning_rate: NonNegativeFloat = OptimizerSettings.content_learning_rate
    encoder_learning_rate: NonNegativeFloat = OptimizerSettings.encoder_learning_rate
    weight_decay: NonNegativeFloat = OptimizerSettings.weight_decay


@dataclass
class PlugInSettings:
    """Content of the items of a DLRM."""

    data: str  # folder or URL with items/*.parquet, one row per item
    item: str  # the sparse feature with the id of the ranked item, one id per row
    content: ContentSettings  # as `content` in a recipe
    item_column: str | None = None  # column of the items' files with their ids; default: `item`
    # By column, as under `items` in schema.yaml, for what a modality's kind does not determine.
    item_columns: dict[str, ItemColumn] = field(default_factory=dict)
    history: str | None = None  # a sparse feature with ids of past items, any number per row
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    # AdamW of the new parameters; null leaves them to your optimizer.
    optimizer: ContentRates | None = field(default_factory=ContentRates)
    on_bad_row: Literal["error", "skip"] = "error"
    cache: str | None = None  # folder of encoded items; default ~/.cache/recsys
    seed: int = 0  # seed of the new weights

    def schema(self, num_items: int) -> Schema:
        columns = {self.item: Column("id", num_embeddings=num_items)}
        if self.history is not None:
            columns[self.history] = Column("sequence", shares=self.item)
        content = {
            kind.modality.column: ItemColumn(kind.column_kind)  # type: ignore[arg-type]
            for kind in make_kinds(self.content.modalities).values()
        }
        content |= {name: c for name, c in self.item_columns.items() if name in content}
        items = Items(self.item_column or self.item, content)
        return Schema(target_item=self.item, group=self.item, columns=columns, items=items)


def load_plug_in_settings(path: Path | str) -> PlugInSettings:
    """Read the settings from YAML.

    Raises:
        ValueError: a missing file, an unknown key, a wrong type, or conflicting settings, named.

    Example::

        from recsys.plug_in import load_plug_in_settings

        settings = load_plug_in_settings("content.yaml")
        assert settings.item == "item" and settings.optimizer is not None
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; write the settings of the content there")
    try:
        values = load_plain_yaml(Path(path).read_bytes())
        settings: PlugInSettings = settings_of(PlugInSettings, values)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def check(settings: PlugInSettings) -> None:
    """Check constraints between settings."""
    names = ("content", "contrastive", "on_bad_row", "cache", "seed")  # those of a run
    validate(Config(**{name: getattr(settings, name) for name in names}))
    if columns := settings.content.history.columns:
        raise ValueError(
            f"content.history.columns is {columns}, but the plug-in reads the content of one "
            "history; leave it out"
        )
    if (share := settings.content.encoder_share) < 1:
        raise ValueError(
            f"content.encoder_share is {share}, but checkpoints of the plug-in do not have "
            "outputs of encoders; leave it out"
        )
    if settings.history == settings.item:
        raise ValueError(
            f"item and history are both '{settings.item}'; name two sparse features, or no history"
        )
