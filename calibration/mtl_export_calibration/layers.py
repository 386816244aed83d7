"""Find what may be quantised: matrix products and convolutions with the base's weights.

    MatMul(x, W)   W a 2-D initializer [I, O], x computed         as `graph.passes` lower linears
    Conv(x, W)     W an initializer [O, I/groups, ...]

Everything else keeps its precision: the low-rank path (its products are inside model-local
functions, its factors have names of their own), products of two activations as in
attention, embeddings, norms, softmax, Gemm (poolers see one token a row) and heads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from mtl_export.errors import UsageError, shortened

OP_TYPES = ("MatMul", "Conv")
WEIGHT_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Initializers of the low-rank path and of per-task stacks, see mtl_export.graph.names.
_OWN = frozenset(
    {"down", "core", "up", "downs", "ups", "weights", "biases", "gain", "table", "starts", "slots"}
)


@dataclass(frozen=True, slots=True)
class QuantLayer:
    """One product with a base weight.

    Attributes:
        name: The module's dotted name; the node's where that is not known or not unique.
        node: Name of the node.
        op_type: ``MatMul`` or ``Conv``.
        x: Name of the activation.
        weight: Name of the weight.
        shape: Shape of the weight.
    """

    name: str
    node: str
    op_type: str
    x: str
    weight: str
    shape: tuple[int, ...]

    @property
    def channel_axis(self) -> int:
        """Return the weight's axis of output channels."""
        return 1 if self.op_type == "MatMul" else 0


def find_layers(
    model: ir.Model, *, heads: Collection[str] = (), exclude: Sequence[str] = ()
) -> list[QuantLayer]:
    """Return the layers of ``model`` that may be quantised, in graph order.

    Args:
        model: A lowered graph.
        heads: Modules that are heads.
        exclude: Regular expressions; a layer is left out where one is found in its name.

    Raises:
        UsageError: An expression cannot be read, or is found in no layer's name.
    """
    found = [layer for node in model.graph if (layer := _layer(node)) is not None]
    counts = Counter(layer.name for layer in found)
    named = [
        layer
        if counts[layer.name] == 1
        else QuantLayer(layer.node, layer.node, layer.op_type, layer.x, layer.weight, layer.shape)
        for layer in found
        if layer.name not in heads
    ]
    patterns = [_pattern(text) for text in exclude]
    idle = [
        pattern.pattern
        for pattern in patterns
        if not any(pattern.search(layer.name) for layer in named)
    ]
    if idle:
        raise UsageError(
            f"--exclude {idle[0]}: it is found in no layer's name",
            expected=(
                f"part of a name such as {shortened([layer.name for layer in named], 3)}, because "
                "a misspelt expression would quantise what you meant to keep"
            ),
            fix="Correct it, or leave it out",
        )
    return [layer for layer in named if not any(pattern.search(layer.name) for pattern in patterns)]


def _layer(node: ir.Node) -> QuantLayer | None:
    if node.domain not in {"", "ai.onnx"} or node.op_type not in OP_TYPES:
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or x.is_initializer() or not weight.is_initializer():
        return None
    values = weight.const_value
    if values is None or values.dtype not in WEIGHT_DTYPES:
        return None
    shape = tuple(int(size) for size in values.shape.numpy())
    if node.op_type == "MatMul" and len(shape) != 2:
        return None
    name = str(weight.name)
    module, _, last = name.rpartition(".")
    if last in _OWN:
        return None
    known = module if module and last in {"weight_t", "weight"} else str(node.name)
    return QuantLayer(known, str(node.name), node.op_type, str(x.name), name, shape)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"--exclude {text}: not a regular expression ({error})",
            expected="one in Python's syntax",
            fix="Correct it",
        ) from error
