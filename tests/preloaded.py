"""What the server of which ranks are forked imports once, so that no rank waits for it."""

import gc
from importlib import import_module

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
collect_garbage_seldom()
