"""Turn a float32 graph into one that computes in float16 or bfloat16.

Weights and activations change their type; islands (``islands``) stay float32 behind Casts.
What runtimes see from outside: token ids stay int64, images are taken as float32, logits and
other results are given as float32; keys and values for the next step keep the graph's type.

A finite number that the type cannot hold, such as the -3.4e38 of attention masks, becomes the
largest that it can: as an infinity it would turn 0 * mask into NaN. NaN and -inf stay, so an id
that no task has and a label that a task lacks read as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.passes.constants import ConstantTensorsPass
from mtl_export.graph.passes.islands import is_float, islands, touches_floats
from mtl_export.graph.passes.value_types import type_values
from mtl_export.names import DTYPE_KEY

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# The largest finite numbers: (2 - 2^-10) 2^15 and (2 - 2^-7) 2^127.
LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: float.fromhex("0x1.fep127")}
FLOATS = frozenset({ir.DataType.FLOAT, *DTYPES.values()})
# Floating inputs and outputs whose names begin so pass from one step to the next.
STATE = ("past_key_values.", "present.")


class PrecisionPass(ir.passes.InPlacePass):
    """Rewrite a graph for ``fp16`` or ``bf16``.

    Args:
        dtype: One of ``DTYPES``.

    Cases
        1. an initializer or a constant: converted, unless an island reads it.
        2. a node of an island: unchanged, its inputs and outputs cast.
        3. any other node: its outputs have the type; Cast to float32 becomes Cast to it.
        4. a floating input but the state: float32, cast where it is read.
        5. a floating output but the state: cast to float32, the name kept.
        6. a subgraph (If, Loop): refused.
    """

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._name = dtype
        self._dtype = DTYPES[dtype]
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert ``model``; its opsets stay."""
        ConstantTensorsPass()(model)  # a graph may be one that an older release wrote
        graph = model.graph
        type_values(graph)
        _refuse_subgraphs(graph)
        nodes = list(graph)
        wide = islands(nodes, self._dtype)
        self._casts.clear()
        low = self._lowered_values(graph, nodes, wide)
        for node in nodes:
            if touches_floats(node):
                wanted = ir.DataType.FLOAT if node in wide else self._dtype
                self._cast_inputs(node, wanted, low)
        self._give_float32(graph, low)
        for node in nodes:
            if node not in wide:
                self._convert_attributes(node)
        for value in low:
            # A new type: graphs of one trace share the old one.
            value.type = ir.TensorType(self._dtype)
            if value.is_initializer():
                value.const_value = _converted(value.const_value, self._dtype)
        self._refuse_constants_in_functions(model)
        model.metadata_props[DTYPE_KEY] = self._name
        return ir.passes.PassResult(model, modified=True)

    def _lowered_values(
        self, graph: ir.Graph, nodes: Sequence[ir.Node], wide: set[ir.Node]
    ) -> set[ir.Value]:
        """Return the values that become low."""
        low = {value for node in nodes if node not in wide for value in node.outputs}
        low |= {value for value in graph.inputs if str(value.name).startswith(STATE)}
        low |= {
            value
            for value in graph.initializers.values()
            if not any(user in wide for user in value.consumers())
        }
        return {value for value in low if is_float(value)}

    def _cast_inputs(self, node: ir.Node, wanted: ir.DataType, low: set[ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or not is_float(value):
                continue
            if (value in low) != (wanted == self._dtype) and node.op_type != "Cast":
                node.replace_input_with(index, self._cast(value, wanted, node))

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node | None) -> ir.Value:
        """Return ``value`` as another type; made once, where the value is made."""
        key = (value, wanted)
        if key not in self._casts:
            name = f"{value.name}/{wanted.name.lower()}"
            graph = value.graph
            ops = tape.Tape(graph)
            made = ops.op("Cast", [value], {"to": wanted}, name=name)
            made.name, made.type, made.shape = f"{name}_value", ir.TensorType(wanted), value.shape
            producer = value.producer()
            if graph is None:
                raise ValueError(f"{value.name} is in no graph")
            if producer is not None:
                graph.insert_after(producer, ops.nodes)
            else:
                graph.insert_before(graph[0], ops.nodes)
            self._casts[key] = made
        return self._casts[key]

    def _give_float32(self, graph: ir.Graph, low: set[ir.Value]) -> None:
        for index, value in enumerate(list(graph.outputs)):
            name = str(value.name)
            if value not in low or name.startswith(STATE):
                continue
            value.name = f"{name}/{self._name}"
            ops = tape.Tape(graph)
            made = ops.op("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/float32")
            made.name, made.type, made.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
            graph.append(ops.nodes[0])
            graph.outputs[index] = made

    def _convert_attributes(self, node: ir.Node) -> None:
        attributes = node.attributes
        if node.op_type == "Cast" and attributes["to"].as_int() == ir.DataType.FLOAT:
            attributes["to"] = ir.AttrInt64("to", self._dtype)
        if node.op_type == "ConstantOfShape":
            given = attributes.get("value")
            tensor = ir.tensor(np.zeros(1, np.float32)) if given is None else given.as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                attributes["value"] = ir.AttrTensor("value", _converted(tensor, self._dtype))
        if node.op_type == "Constant" and is_float(node.outputs[0]):
            tensor = attributes["value"].as_tensor()
            attributes["value"] = ir.AttrTensor("value", _converted(tensor, self._dtype))

    def _refuse_constants_in_functions(self, model: ir.Model) -> None:
        """Check that bodies, which take any type, name none themselves."""
        for function in model.functions.values():
            for node in function:
                given = node.attributes.get("value")
                if node.op_type == "Cast" or (given and given.as_tensor().dtype in FLOATS):
                    raise ValueError(f"{function.name} names a type in its body")


def _refuse_subgraphs(graph: ir.Graph) -> None:
    kinds = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    for node in graph:
        if any(attribute.type in kinds for attribute in node.attributes.values()):
            raise GraphError(
                f"{node.name}: a subgraph ({node.op_type})",
                expected=(
                    "a graph without If, Loop and Scan, because only flat graphs are converted to "
                    "half precision"
                ),
                fix="Export it with --dtype fp32",
            )


def _converted(tensor: ir.TensorProtocol | None, dtype: ir.DataType) -> ir.TensorProtocol:
    """Return a tensor whose values are converted when they are asked for."""
    if tensor is None:
        raise ValueError("an initializer has no values")
    converted = ir.LazyTensor(
        lambda: ir.Tensor(narrowed(tensor.numpy(), dtype), dtype=dtype, name=tensor.name),
        dtype=dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )
    converted.meta.update(getattr(tensor, "meta", {}))
    return converted


def narrowed(values: Array, dtype: ir.DataType) -> Array:
    """Return float32 values as ``dtype``: finite ones stay finite, the rest stay what they are."""
    target = np.dtype(dtype.numpy())
    largest = LARGEST[dtype]
    limited = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    result: Array = limited.astype(target)
    return result
