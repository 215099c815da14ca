"""What the server of which ranks are forked imports and reads once: no rank waits for it."""

import gc
from importlib import import_module

import yaml

from tests.rare_gc import collect_garbage_seldom

gc.disable()  # until all is imported

MODULES = (
    "hypothesis",
    "pandas",
    "peft",
    "pytest",
    "recsys.commands.training",
    "recsys.content.encoders.pretrained",
    "recsys.ranking",
    "recsys.serving.export",
    "recsys.training.train",
    "tests.datasets",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
)

for name in MODULES:
    import_module(name)
# The parser of settings keeps what it has read of signatures.
import_module("recsys.config").load_config("tiny")
schema = import_module("tests.datasets").SCHEMA.format(num_users=9, num_items=9, num_genres=9)
import_module("recsys.data.schema").parse_schema(yaml.safe_load(schema), "schema.yaml")
collect_garbage_seldom()
