"""Counts FLOPs and bytes of a model's parts while PyTorch runs them.

`torch.utils.flop_counter` counts the FLOPs of each operation. Parts whose cost depends only on
shapes run on the meta device, without weights or data: their cost on items of T tokens is a
polynomial in T, which runs at three lengths determine. Ranking models, whose histories have
data-dependent lengths, run once on random vectors with a batch of real ids.

Bytes are those of inputs, weights and outputs: once in the forward; in the backward once more, plus
the gradients of inputs and weights that have one.

Shapes: B batch, U unique history items, D dimension, M modalities, T tokens.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import ContentSettings
from recsys.content.vectors import ContentVectors
from recsys.data.batch import Batch
from recsys.diagnostics.cost.kernel_work import kernel_counts
from recsys.diagnostics.cost.work import FLOAT, PartCost, Work, moved, times
from recsys.ranking.layers.extra_sequences import ExtraSequences
from recsys.ranking.vectors import IDVectors

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_)
BATCHED_PRODUCTS = (aten.bmm, aten.baddbmm)


class WorkCounter(FlopCounterMode):
    """PyTorch's counter, which also counts in-place products, kernels and results kept.

    Example::

        with WorkCounter() as counter:
            torch.ones(2, 3) @ torch.ones(3, 4)
        counter.work().products  # 48
    """

    def __init__(self) -> None:
        """Register the count of matrix products."""
        products = dict.fromkeys(PRODUCTS, self._count_product)
        super().__init__(display=False, custom_mapping=products | kernel_counts())
        self.results: Counter[str] = Counter()  # elements, by module

    def _count_product(self, *shapes: Sequence[int], out_shape: Sequence[int], **_: Any) -> int:
        if torch.is_grad_enabled():
            self.results.update(dict.fromkeys(self.mod_tracker.parents, math.prod(out_shape)))
        return 2 * math.prod(out_shape) * shapes[-1][0]

    def work(self, module: str = "Global", batched_are_products: bool = True) -> Work:
        """Return the FLOPs of a module.

        Args:
            module: its name in `FlopCounterMode`; default: all that ran.
            batched_are_products: whether batched products (on the meta device: attention) count
                as products of matrices.
        """
        counts = self.get_flop_counts().get(module, {})
        counted = PRODUCTS + BATCHED_PRODUCTS * batched_are_products
        products = sum(counts.get(product, 0) for product in counted)
        others = sum(counts.values()) - products
        return Work(products, others, outputs=FLOAT * self.results[module])


@dataclass(frozen=True)
class ItemCost:
    """Work of a module on items of T tokens, forward and backward.

    forward, backward: work per item, per token, and per pair of tokens of one item.
    weights: bytes of the weights in both directions, once per step.
    """

    forward: tuple[Work, Work, Work] = (Work(), Work(), Work())
    backward: tuple[Work, Work, Work] = (Work(), Work(), Work())
    weights: tuple[Work, Work] = (Work(), Work())

    def on(
        self, items: float, tokens: float, pairs: float = 0.0, trained_share: float = 1.0
    ) -> tuple[Work, Work]:
        """Return forward and backward work; `trained_share` of the items have a backward."""
        numbers = (items, tokens, pairs)
        forward, backward = (
            sum((times(work, number) for work, number in zip(of, numbers)), Work())
            for of in (self.forward, self.backward)
        )
        return forward + self.weights[0], times(backward, trained_share) + self.weights[1]


def item_cost(
    module: nn.Module, inputs_of: Callable[[int], Sequence[Tensor]], lengths: Sequence[int]
) -> tuple[ItemCost, list[int]]:
    """Count a module on one item of each length.

    Args:
        module: module on any device; its weights are neither read nor changed.
        inputs_of: length -> arguments of the module, on the meta device.
        lengths: three consecutive lengths, or one if all items have the same.

    Returns:
        The cost, and the size of the output's dimension 1 at each length.
    """
    with torch.compiler.set_stance("force_eager"):
        runs = [_run_on_meta(module, inputs_of(length)) for length in lengths]
    forward, backward, sizes = zip(*runs)
    weights = [
        weight
        for part in module.modules()
        if not isinstance(part, nn.Embedding)  # only single rows are read
        for weight in part.parameters(recurse=False)
    ]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    read = moved(sum(weight.numel() for weight in weights))
    has_backward = any(work != Work() for work in backward)
    cost = ItemCost(
        _polynomial(forward, lengths[0]),
        _polynomial(backward, lengths[0]),
        (read, read + moved(trained) if has_backward else Work()),
    )
    return cost, list(sizes)


def _run_on_meta(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Work, Work, int]:
    """Return forward and backward work, and the size of the output's dimension 1."""
    state = {
        name: torch.empty_like(value, device="meta", requires_grad=value.requires_grad)
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    with WorkCounter() as forward:
        output = functional_call(module, state, tuple(inputs))
    numbers = [value.numel() for value in (*inputs, output) if value.is_floating_point()]
    both = moved(sum(numbers))
    of_forward = forward.work(batched_are_products=False) + both
    if not output.requires_grad:
        return of_forward, Work(), output.shape[1]
    with WorkCounter() as backward:
        output.backward(torch.empty_like(output))
    gradients = moved(sum(value.numel() for value in inputs if value.requires_grad))
    of_backward = backward.work(batched_are_products=False) + both + gradients
    return of_forward, of_backward, output.shape[1]


def _polynomial(runs: Sequence[Work], first: int) -> tuple[Work, Work, Work]:
    """Return the coefficients of 1, T and T² from runs at T = `first`, `first` + 1, `first` + 2."""
    if len(runs) == 1:
        return runs[0], Work(), Work()
    begin, middle, end = runs
    pair = times(begin + times(middle, -2) + end, 0.5)
    token = middle + times(begin, -1) + times(pair, -(2 * first + 1))
    return begin + times(token, -first) + times(pair, -(first**2)), token, pair


def count_ranking(
    ranking: nn.Module,
    pooled_dims: Sequence[int],
    id_dim: int,
    content: ContentSettings | None,
    batch: Batch,
    history_is_unique: bool = True,
    further_histories: ExtraSequences | None = None,
) -> list[PartCost]:
    """Count forward and backward of one row of `batch`, by child of the ranking model.

    A collective where the model standardizes numbers over several ranks.

    The model has real weights, and the batch is on the CPU; its content is not read. `pooled_dims`
    are the dimensions of the pooled ID vectors, `id_dim` that of target and events. With
    `history_is_unique`, `IDVectors` has one history vector per unique item. `further_histories`,
    which encode the histories after the first one, count as a part of their own.
    """
    ids = _random_ids(pooled_dims, id_dim, batch, history_is_unique)
    of_content = None if content is None else _random_content(content, batch)
    parts = []
    if further_histories is not None:
        parts += _count(further_histories, "further histories, {}", batch, ids, of_content)
        widths = further_histories.widths.values()
        more = [torch.randn(batch.batch_size, width, requires_grad=True) for width in widths]
        ids = replace(ids, pooled=[*ids.pooled, *more])
    return parts + _count(ranking, "ranking, {}", batch, ids, of_content)


def _count(
    module: nn.Module, name_of: str, batch: Batch, *inputs: IDVectors | ContentVectors | None
) -> list[PartCost]:
    """Count a module that reads `inputs` and a batch, by child."""
    module = deepcopy(module).cpu().train()  # keeps gradients off the real model
    numbers: Counter[str] = Counter()  # in inputs, weights and outputs, by child

    def add_numbers(name: str, child: nn.Module, inputs: Any, output: Any) -> None:
        values = [*_tensors(inputs), *_tensors(output), *child.parameters()]
        numbers[name] += sum(value.numel() for value in values if value.is_floating_point())

    for name, child in module.named_children():
        child.register_forward_hook(partial(add_numbers, name))
    with torch.compiler.set_stance("force_eager"), WorkCounter() as counter:
        output = module(*inputs, batch)
        forward, whole = _by_child(counter, module), counter.work()
        _sum_of(output).backward()
        backward = counter.work() + times(whole, -1)
    parts = []
    for name, work in forward.items():
        moves = moved(numbers[name])
        if work.flops or moves.bytes:
            both = work + moves, _share_of(backward, work, whole) + times(moves, 2)
            parts.append(PartCost(name_of.format(name.replace("_", " ")), "ranking", *both))
    return [part.scaled(1 / batch.batch_size) for part in parts]


def _share_of(backward: Work, work: Work, whole: Work) -> Work:
    """Return a child's part of a backward; the counter may count an operation in two children.

    Products are split by those of the forward, and so are the others, such as kernels.
    """
    return Work(
        products=backward.products * work.products / max(whole.products, 1),
        others=backward.others * work.others / max(whole.others, 1),
        outputs=backward.outputs * work.outputs / max(whole.outputs, 1),
    )


def _sum_of(output: Any) -> Tensor:
    """Return the sum of what a module computed, as a scalar with gradient."""
    if isinstance(output, IDVectors):
        return torch.cat(output.pooled, dim=1).sum()
    return (output if isinstance(output, Tensor) else output.logits).sum()


def _random_ids(
    pooled_dims: Sequence[int], id_dim: int, batch: Batch, history_is_unique: bool
) -> IDVectors:
    rows, places = batch.batch_size, len(batch.history_index)
    sizes = [(rows, dim) for dim in pooled_dims] + [(rows, id_dim)]
    sizes += [(len(batch.history_items) if history_is_unique else places, id_dim)]
    *pooled, target, history = (torch.randn(size, requires_grad=True) for size in sizes)
    further = [torch.randn(len(of.values), id_dim, requires_grad=True) for of in batch.further]
    return IDVectors(pooled, target, history, history_is_unique, further=further)


def _random_content(content: ContentSettings, batch: Batch) -> ContentVectors:
    rows, unique, dim = batch.batch_size, len(batch.history_items), content.dim
    spaces = content.vector_dim // dim - 1
    return ContentVectors(
        target=torch.randn(rows, dim, requires_grad=True),
        history=torch.randn(unique, dim, requires_grad=True),
        target_modalities=torch.randn(rows, spaces, dim, requires_grad=True),
        history_modalities=torch.randn(unique, spaces, dim),
    )


def _by_child(counter: WorkCounter, module: nn.Module) -> dict[str, Work]:
    """Return the work counted so far by child; `other`: work outside of all children."""
    parent, names = type(module).__name__, [name for name, _ in module.named_children()]
    found = {name: counter.work(f"{parent}.{name}") for name in names}
    return found | {"other": counter.work() + times(sum(found.values(), Work()), -1)}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, ContentVectors):
        yield from _tensors([value.target, value.target_modalities, value.read_history()])
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
