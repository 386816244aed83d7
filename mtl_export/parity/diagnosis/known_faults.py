"""Known faults of one layer, each as what the layer would compute if it had it.

    y = gain . (x W^T + ((x down^T) core^T) up^T) + b

Every fault is a formula of the same shape with other tensors: Lambda transposed, another task's
core, no adapter at all. Those of a family come from its own stored tensors, read again after an
edit of one of them; those that every family can have come from the normal form. Nothing here
looks at a candidate: ``localise`` holds its outputs against each formula.

O outputs, I inputs of the layer, T tasks, n up-projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer, is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.family import family_named
from mtl_export.adapters.normal_form import AnyAdapter, Factors
from mtl_export.checkpoint.checkpoint import LayerTensors, Task
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import MtlExportError

# All orders of so many up-projections are tried; of more, only exchanges of two.
MOST_ORDERED = 4
Values = dict[str, Array]
Edit = Callable[[Values, dict[str, float]], bool]


@dataclass(frozen=True, slots=True)
class Formula:
    """What one linear layer computes with.

    Attributes:
        weight: ``[O, I]``.
        bias: ``[O]``, or None.
        factors: Of the adapter, None where there is none.
        gain: ``[O]``, or None where every gain is 1.
    """

    weight: Array
    bias: Array | None = None
    factors: Factors | None = None
    gain: Array | None = None

    def __call__(self, x: Array) -> Array:
        """Return y for x ``[..., I]``, float64."""
        y = x @ self.weight.T.astype(np.float64)
        if self.factors is not None:
            z = x @ self.factors.down.T.astype(np.float64)
            y = y + z @ self.factors.core.T @ self.factors.up.T.astype(np.float64)
        if self.gain is not None:
            y = y * self.gain
        result: Array = y if self.bias is None else y + self.bias
        return result

    def largest_sum(self, x: Array) -> float:
        """Return the largest sum of the absolute values that one element of y is the sum of."""
        size = np.abs(x)
        total = size @ np.abs(self.weight).T.astype(np.float64)
        if self.factors is not None:
            z = size @ np.abs(self.factors.down).T.astype(np.float64)
            total = total + z @ np.abs(self.factors.core).T @ np.abs(self.factors.up).T
        return float(total.max(initial=0.0))

    def largest_step(self, x: Array) -> float:
        """Return the largest number on the way to y, which a narrow dtype must hold too."""
        steps = [x @ self.weight.T.astype(np.float64)]
        if self.factors is not None:
            z = x @ self.factors.down.T.astype(np.float64)
            steps += [z, z @ self.factors.core.T, self(x)]
        return max(float(np.abs(step).max(initial=0.0)) for step in steps)


@dataclass(frozen=True, slots=True)
class Fault:
    """One known fault.

    Attributes:
        cause: In words, without a full stop.
        formula: What a layer with this fault computes.
        other_task: The task whose tensors it takes, if that is the fault.
    """

    cause: str
    formula: Formula
    other_task: str = ""


def right_formula(bound: BoundModel, module: str, task_index: int) -> Formula | None:
    """Return what the layer should compute; None for one that is not linear."""
    adapters = bound.adapters
    if module in adapters.heads:
        head = adapters.heads[module][task_index]
        return Formula(head.weight, head.bias)
    layer = adapters.layers.get(module)
    weight = _weight(bound, module, task_index)
    if weight is None or (layer is not None and _is_embedding(bound, layer)):
        return None
    bias = _bias(bound, module, task_index)
    if layer is None:
        return Formula(weight, bias)
    gain = None if layer.gain is None else layer.gain[task_index]
    return Formula(weight, bias, layer.factors(task_index), gain)


def known_faults(bound: BoundModel, module: str, task: Task) -> Iterator[Fault]:
    """Yield every known fault of a layer under a task; none for a layer that is not linear."""
    right = right_formula(bound, module, task.index)
    if right is None:
        return
    if module in bound.adapters.heads:
        yield from _of_heads(bound, module, task)
    else:
        yield from _of_families(bound, module, task, right)
        yield from _of_adapters(bound, module, task, right)
        yield from _of_other_layers(bound, module, task, right)
    yield from _of_biases(bound, module, right)


def other_tasks(bound: BoundModel, module: str, task: Task) -> Iterator[Fault]:
    """Yield the layer as each other task has it."""
    what = "head" if module in bound.adapters.heads else "adapter"
    for other in bound.adapters.tasks:
        formula = right_formula(bound, module, other.index)
        if other.index != task.index and formula is not None:
            yield Fault(f"the {what} of task {other.name}", formula, other.name)


def _of_heads(bound: BoundModel, module: str, task: Task) -> Iterator[Fault]:
    heads = bound.adapters.heads[module]
    own = heads[task.index]
    width = len(own.weight)
    for fault in other_tasks(bound, module, task):
        yield fault
        # Stacks are as wide as the widest head, zeros where a task has no label.
        other = np.zeros((width, own.weight.shape[1]))
        shared = fault.formula.weight[:width]
        other[: len(shared)] = shared
        yield Fault(
            f"the weight of the head of task {fault.other_task}, with its own bias",
            Formula(other, own.bias), fault.other_task,
        )  # fmt: skip
    if width > 1:
        yield Fault(
            "the labels of the head are reversed", Formula(own.weight[::-1], own.bias[::-1])
        )


def _of_adapters(bound: BoundModel, module: str, task: Task, right: Formula) -> Iterator[Fault]:
    """Yield what can happen to the adapter of any family."""
    factors = right.factors
    if right.gain is not None:
        yield Fault("the gain (DoRA's magnitude) is missing", dataclasses.replace(right, gain=None))
    if factors is None and right.gain is None:
        yield from other_tasks(bound, module, task)
        return
    bare = Formula(right.weight, right.bias)
    yield Fault("the adapter is not merged: the base weight alone answers", bare)
    yield from other_tasks(bound, module, task)
    if factors is None:
        return

    def with_core(core: Array) -> Formula:
        return dataclasses.replace(right, factors=dataclasses.replace(factors, core=core))

    yield Fault("the adapter is merged twice", with_core(2 * factors.core))
    yield Fault("the adapter is subtracted", with_core(-factors.core))
    if right.gain is not None:
        yield Fault(
            "the adapter's low-rank part is missing", dataclasses.replace(right, factors=None)
        )
    core = factors.core
    if core.shape[0] == core.shape[1] and not np.array_equal(core, core.T):
        yield Fault("the core is transposed", with_core(core.T))


def _of_biases(bound: BoundModel, module: str, right: Formula) -> Iterator[Fault]:
    if right.bias is None or not right.bias.any():
        return
    yield Fault("the bias is missing", dataclasses.replace(right, bias=None))
    yield Fault("the bias is added twice", dataclasses.replace(right, bias=2 * right.bias))
    name = f"{module}.bias"
    is_stored = name.removeprefix(bound.prefix) in bound.base.tensors
    if is_stored and module not in bound.adapters.heads:
        base = bound.base_tensor(name).widened()
        if not np.array_equal(base, right.bias):
            yield Fault(
                "the base's bias in place of the trained one", dataclasses.replace(right, bias=base)
            )


def _of_other_layers(bound: BoundModel, module: str, task: Task, right: Formula) -> Iterator[Fault]:
    for other, outline in bound.adapters.outlines.items():
        shape = (outline.out_features, outline.in_features)
        if other == module or shape != right.weight.shape or _is_embedding(bound, outline):
            continue
        found = right_formula(bound, other, task.index)
        if found is not None:
            yield Fault(f"the weights of layer {other}", found)
            swapped = dataclasses.replace(right, factors=found.factors, gain=found.gain)
            yield Fault(f"the adapter of layer {other}", swapped)


def _of_families(bound: BoundModel, module: str, task: Task, right: Formula) -> Iterator[Fault]:
    """Yield what can happen to a family's own tensors, its formula computed again."""
    members = bound.checkpoint.members
    checkpoint = members[task.index] if members else bound.checkpoint
    layer = checkpoint.layers.get(module)
    if layer is None:
        return
    read = family_named(checkpoint.family).layer_adapter
    base = BaseLayer(module, bound.base, layer.embedding)
    for cause, edit in _edits(layer):
        values = {role: tensor.widened().copy() for role, tensor in layer.tensors.items()}
        hyper = dict(layer.hyper)
        if not edit(values, hyper):
            continue
        try:
            adapter = read(_stored(layer, values, hyper), base)
        except MtlExportError:
            continue  # this family cannot have the fault
        index = 0 if members else task.index
        gain = None if adapter.gain is None else adapter.gain[index]
        yield Fault(cause, dataclasses.replace(right, factors=adapter.factors(index), gain=gain))


def _edits(layer: LayerTensors) -> Iterator[tuple[str, Edit]]:
    yield "Lambda is transposed", _lambda(lambda full: full.swapaxes(-1, -2))
    yield "only Lambda's diagonal is used", _lambda(lambda full: full * np.eye(full.shape[-1]))
    yield (
        "Lambda is missing",
        _lambda(lambda full: np.broadcast_to(np.eye(full.shape[-1]), full.shape)),
    )
    for role in (name for name in layer.tensors if name.startswith("mixing")):
        mean = "the mean of the up-projections instead of their softmax"
        yield mean if role == "mixing" else f"{mean} ({role})", _role(role, np.zeros_like)
    yield "the gate is missing: equal weights for all experts", _role("gate", np.zeros_like)
    for cause, factor in (
        ("the temperature is doubled", 2.0), ("the temperature is halved", 0.5),
        ("the temperature is missing (1 instead)", 0.0),
    ):  # fmt: skip
        yield cause, _temperature(factor)
    yield "alpha / r is missing", _scale(lambda scale, rank: 1.0)
    yield "alpha is missing (1 / r instead of alpha / r)", _scale(lambda scale, rank: 1.0 / rank)
    yield "1 / r is missing (alpha instead of alpha / r)", _scale(lambda scale, rank: scale * rank)
    yield "alpha / r is applied twice", _scale(lambda scale, rank: scale**2)
    yield "alpha / sqrt(r) instead of alpha / r", _scale(lambda scale, rank: scale * rank**0.5)
    yield "the learnt scale is missing", _without("scaler")
    for role in (name for name in layer.tensors if name.startswith("up")):
        shape = layer.tensors[role].shape
        for order in _orders(shape[0]) if len(shape) == 3 else ():
            shown = ", ".join(str(index + 1) for index in order)
            cause = f"the up-projections are in another order ({shown})"
            yield cause, _ordered(role, order)


def _orders(count: int) -> list[tuple[int, ...]]:
    """Return the wrong orders of ``count`` up-projections."""
    right = tuple(range(count))
    if count <= MOST_ORDERED:
        return [order for order in permutations(right) if order != right]
    found = []
    for first in range(count):
        for second in range(first + 1, count):
            order = list(right)
            order[first], order[second] = second, first
            found.append(tuple(order))
    return [*found, right[::-1]]


def _ordered(role: str, order: tuple[int, ...]) -> Edit:
    return _role(role, lambda up: up[list(order)])


def _role(role: str, change: Callable[[Array], Array]) -> Edit:
    def edit(values: Values, hyper: dict[str, float]) -> bool:
        if role not in values:
            return False
        changed = np.ascontiguousarray(change(values[role]))
        differs = not np.array_equal(changed, values[role])
        values[role] = changed
        return differs

    return edit


def _lambda(change: Callable[[Array], Array]) -> Edit:
    def full_only(stored: Array) -> Array:
        if stored.ndim == 3:
            return change(stored)
        # Diagonals: the transpose changes nothing, and a missing one is all ones.
        full = stored[..., None] * np.eye(stored.shape[-1], dtype=stored.dtype)
        return np.ascontiguousarray(np.diagonal(change(full), axis1=-2, axis2=-1))

    return _role("lambda", full_only)


def _temperature(factor: float) -> Edit:
    def edit(values: Values, hyper: dict[str, float]) -> bool:
        if "temperature" not in hyper:
            return False
        before = hyper["temperature"]
        hyper["temperature"] = before * factor if factor else 1.0
        return hyper["temperature"] != before

    return edit


def _scale(change: Callable[[float, int], float]) -> Edit:
    def edit(values: Values, hyper: dict[str, float]) -> bool:
        if "down" not in values:
            return False
        rank = int(np.prod(values["down"].shape[:-1]))
        name = "scaling" if "scaling" in hyper else "alpha"
        if name not in hyper:
            return False
        unit = 1.0 if name == "scaling" else 1.0 / rank
        before = hyper[name] * unit
        hyper[name] = change(before, rank) / unit
        return not np.isclose(hyper[name] * unit, before)

    return edit


def _without(role: str) -> Edit:
    def edit(values: Values, hyper: dict[str, float]) -> bool:
        return values.pop(role, None) is not None

    return edit


def _stored(layer: LayerTensors, values: Values, hyper: Mapping[str, float]) -> LayerTensors:
    names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}

    def tensor(role: str, value: Array) -> Tensor:
        return Tensor(f"{layer.module}.{role}", names[value.dtype], value.shape, lambda: value)

    tensors = {role: tensor(role, value) for role, value in values.items()}
    return dataclasses.replace(layer, tensors=tensors, hyper=hyper)


def _weight(bound: BoundModel, module: str, task_index: int) -> Array | None:
    """Return the weight ``[O, I]`` below the adapter; None where it is no matrix."""
    name = f"{module}.weight"
    own = (
        None if module in bound.adapters.outlines else bound.adapters.replacement(name, task_index)
    )
    try:
        weight = bound.base_tensor(name).widened() if own is None else own
    except KeyError:
        return None
    if weight.ndim != 2:
        return None
    return weight.T if is_conv1d(bound.base.config, module) else weight


def _bias(bound: BoundModel, module: str, task_index: int) -> Array | None:
    name = f"{module}.bias"
    own = bound.adapters.replacement(name, task_index)
    if own is not None:
        return own
    if name.removeprefix(bound.prefix) not in bound.base.tensors:
        return None
    return bound.base_tensor(name).widened()


def _is_embedding(bound: BoundModel, layer: AnyAdapter) -> bool:
    return layer.transposed and not is_conv1d(bound.base.config, layer.module)
