"""What goes into and comes out of every layer that tasks change, read off an exported graph.

    y = <module>/matmul(x, ...) -> <module>/adapted -> <module>/add        given x, result y

Lowering names its nodes ``<module>/<step>`` (``names``). A layer's kernel is the node that takes
x; from there its own nodes lead to y, and backwards through the changes of shape (``row_view``)
to x as the model has it. Quantisers put Q and DQ before the kernel: x is what they are given.
A graph whose nodes were renamed since has no taps, and nobody guesses any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

# The node that takes x, in order of preference: a joint GEMM has no ``matmul`` of its own.
KERNELS = ("join", "matmul", "head", "normalised", "gather", "rows")
SHAPE_OPS = frozenset({"Reshape", "Transpose"})
ROUNDING_OPS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class Tap:
    """One layer in a graph.

    Attributes:
        module: Its dotted name.
        given: Name of the value that it is given.
        result: Name of the value that it makes.
        is_quantised: What it is given is rounded to few bits first.
    """

    module: str
    given: str
    result: str
    is_quantised: bool = False


def owner(node: ir.Node) -> str:
    """Return the module whose layer a node of ours serves; "" for all other nodes."""
    module, slash, _ = (node.name or "").partition("/")
    return module if slash else ""


def layer_taps(model: ir.Model, modules: Iterable[str]) -> tuple[Tap, ...]:
    """Return the taps of those of ``modules`` that ``model`` uses once, in the order they run."""
    again = (node.name.partition("/")[0].partition("@") for node in model.graph if node.name)
    # Of a layer that is used several times, it is not said which use a finding is about.
    wanted = set(modules).difference(module for module, several, _ in again if several)
    kernels: dict[str, tuple[int, int, ir.Node]] = {}
    for place, node in enumerate(model.graph):
        module, _, step = (node.name or "").partition("/")
        if module in wanted and step in KERNELS:
            kernel = (KERNELS.index(step), place, node)
            kernels[module] = min(kernel, kernels.get(module, kernel), key=lambda one: one[0])
    in_order = sorted(kernels.items(), key=lambda item: item[1][1])
    found = (_tap(module, node) for module, (_, _, node) in in_order)
    return tuple(tap for tap in found if tap is not None)


def with_outputs(model: ir.Model, taps: Sequence[Tap]) -> None:
    """Make the tapped values outputs of ``model``, after its own."""
    there = {value.name for value in model.graph.outputs} | {v.name for v in model.graph.inputs}
    wanted = {name for tap in taps for name in (tap.given, tap.result)} - there
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in sorted(wanted))


def _tap(module: str, kernel: ir.Node) -> Tap | None:
    slot = 1 if kernel.op_type == "Gather" else 0
    given = kernel.inputs[slot] if len(kernel.inputs) > slot else None
    is_quantised = False
    while given is not None and (before := given.producer()) is not None:
        own_shape = before.op_type in SHAPE_OPS and owner(before) == module
        if not own_shape and before.op_type not in ROUNDING_OPS:
            break
        is_quantised |= before.op_type in ROUNDING_OPS
        given = before.inputs[0]
    result = _last(module, kernel.outputs[0])
    if given is None or not given.name or not result.name or given.is_initializer():
        return None
    return Tap(module, given.name, result.name, is_quantised)


def _last(module: str, value: ir.Value) -> ir.Value:
    """Return what the layer's own nodes make of ``value`` in the end."""
    while True:
        own = [node for node in value.consumers() if owner(node) == module]
        if not own:
            return value
        value = own[0].outputs[0]
