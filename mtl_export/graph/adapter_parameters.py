"""What a task gives a graph that takes adapters as input, layer by layer.

    layer of shared projections   core [D, U]                   no task: zeros
    layer of own factors          down [I, R], up [R, O]        zeros
    gains, own biases             gain, task_bias [O]           ones, the base's
    head                          weight_t [I, L], bias [L]     zeros, NaN
    layer of own weights          weight_t [I, O], bias [O]     the base's
    embedding                     down [V, R], up [R, O], gain; or task_weight [V, O]
    LayerNorm                     task_weight, task_bias [O]    the base's
    output of some tasks          absent [1]                    NaN

The defaults make the base model. It has no head for any task, so a head's default answers NaN:
a session without an active adapter must not look like one. R and L are the widest of any
task; lesser ranks are padded with zeros, absent labels have weight 0 and bias -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AnyAdapter, Factors, LayerAdapter
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.graph.passes.own_tensors import task_bias, task_linear, task_tensor
from mtl_export.graph.passes.stacks import absences, stacked_heads


@dataclass(frozen=True)
class Parameter:
    """One optional input.

    Attributes:
        module: Whose it is.
        part: Last part of its name.
        shape: Its shape.
        default: Returns what the base has.
        value: Returns what a task has, by its id.
    """

    module: str
    part: str
    shape: tuple[int, ...]
    default: Callable[[], Array]
    value: Callable[[int], Array]

    @property
    def name(self) -> str:
        """Return the input's name."""
        return names.part(self.module, self.part)


def delta_parameters(layer: AnyAdapter) -> list[Parameter]:
    """Return what the low-rank part of a layer takes; empty where there is none."""
    module = layer.module
    if isinstance(layer, LayerAdapter):
        shape = (layer.down.shape[0], layer.up.shape[1])
        return [Parameter(module, "core", shape, _zeros(shape), lambda t: layer.core[t].T)]
    return factor_parameters(layer)


def factor_parameters(layer: AnyAdapter) -> list[Parameter]:
    """Return both factors of a layer as inputs, the core inside ``up``."""
    blocks = [layer.factors(index) for index in range(layer.task_count)]
    if all(block is None for block in blocks):
        return []
    rank = max(block.down.shape[0] for block in blocks if block is not None)
    shapes = (layer.in_features, rank), (rank, layer.out_features)

    def down(task_index: int) -> Array:
        block: Factors | None = blocks[task_index]
        value = np.zeros(shapes[0])
        if block is not None:
            value[:, : block.down.shape[0]] = block.down.T
        return value

    def up(task_index: int) -> Array:
        block: Factors | None = blocks[task_index]
        value = np.zeros(shapes[1])
        if block is not None:
            value[: block.down.shape[0]] = (block.up.astype(np.float64) @ block.core).T
        return value

    return [
        Parameter(layer.module, "down", shapes[0], _zeros(shapes[0]), down),
        Parameter(layer.module, "up", shapes[1], _zeros(shapes[1]), up),
    ]


def gain_parameter(layer: AnyAdapter) -> Parameter | None:
    """Return the gains of a layer, None if it has none."""
    gain = layer.gain
    if gain is None:
        return None
    shape = (layer.out_features,)
    return Parameter(layer.module, "gain", shape, lambda: np.ones(shape), lambda t: gain[t])


def bias_parameter(bound: BoundModel, module: str) -> Parameter | None:
    """Return the bias of a linear layer, None if no task trained its own."""
    adapters, name = bound.adapters, names.bias(module)
    own = [adapters.replacement(name, task.index) for task in adapters.tasks]
    if name in adapters.replaced or all(bias is None for bias in own):
        return None
    shape = next(bias.shape for bias in own if bias is not None)

    def default() -> Array:
        stored = bound.base.tensors.get(name.removeprefix(bound.prefix))
        return np.zeros(shape) if stored is None else stored.widened()

    return Parameter(module, "task_bias", shape, default, lambda t: task_bias(bound, module, t))


def head_parameters(bound: BoundModel, module: str) -> list[Parameter]:
    """Return weight and bias of a head, or of a layer that tasks trained whole."""
    heads = bound.adapters.heads.get(module)
    if heads is None:
        return _whole_parameters(bound, module)
    # Slice T is NaN.
    weights, biases = stacked_heads(heads)
    return [
        Parameter(
            module, "weight_t", weights.shape[1:], _zeros(weights.shape[1:]), lambda t: weights[t]
        ),
        Parameter(module, "bias", biases.shape[1:], lambda: biases[-1], lambda t: biases[t]),
    ]


def _whole_parameters(bound: BoundModel, module: str) -> list[Parameter]:
    first = task_linear(bound, module, 0)
    shape = first.weight.shape[::-1]
    name = f"{module}.weight"

    def base_weight() -> Array:
        stored = bound.base_tensor(name).widened()
        return stored if is_conv1d(bound.base.config, module) else stored.T

    def base_bias() -> Array:
        stored = bound.base.tensors.get(names.bias(module).removeprefix(bound.prefix))
        return np.zeros(shape[1:]) if stored is None else stored.widened()

    return [
        Parameter(
            module, "weight_t", shape, base_weight, lambda t: task_linear(bound, module, t).weight.T
        ),
        Parameter(
            module, "bias", shape[1:], base_bias, lambda t: task_linear(bound, module, t).bias
        ),
    ]


def absent_parameter(bound: BoundModel, module: str) -> Parameter:
    """Return what is added to an output that is the answer of some tasks only."""
    rows = absences(bound.adapters, module)
    return Parameter(module, "absent", (1,), lambda: np.full(1, np.nan), lambda t: rows[t])


def own_parameter(bound: BoundModel, module: str, kind: str) -> Parameter:
    """Return a whole weight or bias of an embedding or a norm."""
    name = f"{module}.{kind}"
    base = bound.base_tensor(name)
    return Parameter(
        module, f"task_{kind}", base.shape, base.widened, lambda t: task_tensor(bound, name, t)
    )


def _zeros(shape: tuple[int, ...]) -> Callable[[], Array]:
    return lambda: np.zeros(shape)
