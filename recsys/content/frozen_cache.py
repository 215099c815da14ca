"""Outputs of the frozen part of an encoder, computed once per item and kept on disk.

Layers below the lowest trained one give the same output for an item at every step, so they run
once per item instead of once per step. The ranks of a machine share the work and the file. It is
named by a hash of the content, of the frozen weights and of the split, so it is never stale.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recsys.batch import ContentInput
from recsys.content.encoders import Encoder, TransformerEncoder
from recsys.data.content_store import ContentStore, digest_of
from recsys.data.ragged_array import RaggedArray
from recsys.ranks import Ranks

ITEMS_PER_CALL = 64


def _weights_digest(encoder: Encoder) -> str:
    """A hash of all weights; adapters start anew in each run and belong to no cache."""
    parts: list[Any] = []
    for name, tensor in encoder.state_dict().items():
        if "lora_" not in name:
            # A frozen layer is called base_layer once an adapter stands beside it.
            parts += [name.replace(".base_layer", ""), memoryview(tensor.numpy().tobytes())]
    return digest_of(*parts)


def _split_of(encoder: Encoder) -> Any:
    """What besides the weights decides on the outputs of the frozen part."""
    if isinstance(encoder, TransformerEncoder):
        config = encoder.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        return encoder.first_trained, encoder.training_mode, encoder.pooling, config
    module = getattr(encoder, "module", encoder)
    return f"{type(module).__module__}.{type(module).__qualname__}: {module}"


def _content_of(array: RaggedArray, rows: np.ndarray, is_image: bool) -> ContentInput:
    values, mask = array.gather(rows)
    return ContentInput(
        torch.from_numpy(values[:, 0] if is_image else values), torch.from_numpy(mask)
    )


@torch.no_grad()
def cache_frozen_outputs(store: ContentStore, name: str, encoder: Encoder, ranks: Ranks) -> None:
    """Makes or finds the cached outputs of `encoder.frozen` and serves them from `store`.

    A collective: all ranks call it. The encoder's frozen layers may be dropped afterwards.
    """
    key = digest_of(store.folders[name].name, _weights_digest(encoder), _split_of(encoder))
    folder = store.cache / f"frozen-{name}-{key}"
    source = store.arrays[name]
    is_image = store.modalities[name].kind == "image"
    rows = np.flatnonzero(source.lengths > 0)
    encoder.to(ranks.device).eval()
    temporary = _shared_temporary(folder, ranks)
    if temporary is not None:
        # Of like length together, so that little is computed on padding.
        rows = rows[np.argsort(source.lengths[rows], kind="stable")]
        try:
            with ranks.all_or_none():
                if ranks.is_first_of_machine:
                    _create(temporary, source, rows, encoder, is_image, ranks)
            with ranks.all_or_none():
                _encode_share(temporary, source, rows, encoder, is_image, ranks, name)
            with ranks.all_or_none():
                if ranks.is_first_of_machine:
                    _publish(temporary, folder)
        finally:
            if ranks.is_first_of_machine:
                shutil.rmtree(temporary, ignore_errors=True)
    store.use(name, folder)
    encoder.drop_frozen_layers()


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else a machine that shares the cache was faster
            raise


def _shared_temporary(folder: Path, ranks: Ranks) -> Path | None:
    """A new folder that the ranks of a machine share; None if every machine has the cache.

    Where one machine lacks it all encode again, so that no rank is missing in a collective.
    """
    if all(ranks.gather(folder.exists())):
        return None
    made: str | None = None
    if ranks.is_first_of_machine:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=".frozen-", dir=folder.parent)
    of_machines = [path for path in ranks.gather(made)[: ranks.rank + 1] if path is not None]
    return Path(of_machines[-1])


def _create(
    folder: Path,
    source: RaggedArray,
    rows: np.ndarray,
    encoder: Encoder,
    is_image: bool,
    ranks: Ranks,
) -> None:
    """The empty array, its size known from the output of the last, longest item."""
    lengths = np.zeros(len(source), dtype=np.int64)
    shape: tuple[int, ...] = (encoder.output_dim,)
    if len(rows):
        content = _content_of(source, rows[-1:], is_image)
        output = encoder.frozen(content.to(ranks.device))
        num_tokens = output.mask.shape[1]
        # The longest text shows whether its tokens were pooled into one.
        keeps_tokens = not is_image and num_tokens == content.mask.shape[1]
        lengths[rows] = source.lengths[rows] if keeps_tokens else num_tokens
    RaggedArray.create(folder, lengths, shape, "float32")


def _encode_share(
    folder: Path,
    source: RaggedArray,
    rows: np.ndarray,
    encoder: Encoder,
    is_image: bool,
    ranks: Ranks,
    name: str,
) -> None:
    array = RaggedArray(folder, writable=True)
    local_world_size = ranks.local_world_size
    calls = [rows[start : start + ITEMS_PER_CALL] for start in range(0, len(rows), ITEMS_PER_CALL)]
    share = calls[ranks.local_rank :: local_world_size]
    if ranks.is_first:
        print(f"encoding '{name}' of {len(rows):,} items once, into {folder.parent}", flush=True)
    # disable=None: no bar where there is no terminal.
    for call in tqdm(share, name, disable=None if ranks.is_first else True, unit_scale=64):
        output = encoder.frozen(_content_of(source, call, is_image).to(ranks.device))
        _write(array, call, output.values.cpu())
    array.values.flush()


def _write(array: RaggedArray, rows: np.ndarray, values: Tensor) -> None:
    for row, tokens in zip(rows, values.numpy(), strict=True):
        start, stop = array.offsets[row], array.offsets[row + 1]
        array.values[start:stop] = tokens[: stop - start]
