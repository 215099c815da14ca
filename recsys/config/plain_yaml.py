"""YAML that stays data, for schemas and configurations that others wrote.

The argument parser would import the module of any `class_path` it meets, a few lines of aliases can
stand for more than any memory holds, and of a key that is there twice one would be lost.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def load_plain_yaml(text: bytes) -> Any:
    """Lists, mappings, text and numbers.

    Raises:
        yaml.YAMLError: the text is no YAML, or has an alias, a class, or a key twice.

    Example::

        load_plain_yaml(b"target_item: item")  # {"target_item": "item"}
    """
    return yaml.load(text, _PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}; write its content instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if key == "class_path" or keys.count(key) > 1:
                cause = "names code, which is never loaded" if key == "class_path" else "is twice"
                raise yaml.YAMLError(f"key '{key}' {cause}; remove it{node.start_mark}")
        return super().construct_mapping(node, deep)
