"""Private parts of TorchRec: which of them an upgrade has changed."""

import inspect
from importlib.metadata import version
from typing import Any

from torchrec.distributed import dist_data, model_parallel
from torchrec.distributed.train_pipeline import runtime_forwards, train_pipelines, utils

from recsys.distributed.torchrec_internals import TORCHREC_VERSION

# What `recsys.distributed.torchrec_internals` uses: a part of TorchRec, and names in its source.
PRIVATE_PARTS: dict[Any, str] = {
    dist_data.KJTAllToAll: "_pg _splits _stagger",
    dist_data.KJTAllToAllTensorsAwaitable: "_workers _recat _input_splits _output_splits "
    "_input _stride_per_rank",
    model_parallel.DistributedModelParallel: "_dmp_wrapped_module _env",
    train_pipelines.TrainPipelineSparseDist: "_pipeline_model _pipelined_modules sync_embeddings",
    utils: "_input_dists _dist",
    runtime_forwards: "BaseForward",
}


def test_the_installed_torchrec_has_the_private_parts_that_training_uses() -> None:
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in PRIVATE_PARTS.items()
        for name in names.split()
        if name not in inspect.getsource(cls)
    ]
    assert not missing, f"written for TorchRec {TORCHREC_VERSION}, not {version('torchrec')}"
