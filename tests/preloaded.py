"""What the server of which ranks are forked imports once, so that no rank waits for it.

Python's garbage collector would visit all that again in each rank, and copy the pages it lies on:
`gc.freeze` tells it that none of it is garbage.
"""

import gc
from importlib import import_module

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
gc.collect()
gc.freeze()
