"""YAML that stays data, for schemas and configurations from other people.

The argument parser would import the module of any `class_path`, a few lines of aliases can expand
beyond any memory, and one value of a duplicate key would be lost.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def load_plain_yaml(text: bytes) -> Any:
    """Read lists, mappings, text and numbers.

    Raises:
        yaml.YAMLError: the text is not YAML, or has an alias, a class path or a duplicate key.

    Example::

        load_plain_yaml(b"target_item: item")  # {"target_item": "item"}
    """
    return yaml.load(text, _PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """Loader that refuses aliases, class paths and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}; write its content instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a class path or a duplicate key."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if key == "class_path" or keys.count(key) > 1:
                cause = "names code, which is never loaded" if key == "class_path" else "is twice"
                raise yaml.YAMLError(f"key '{key}' {cause}; remove it{node.start_mark}")
        return super().construct_mapping(node, deep)
