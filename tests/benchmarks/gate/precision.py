"""Faults of precision: parts of a model in fewer bits than the file says, and values lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from tests.benchmarks.gate.fault import ALL, HF, ONE, Fault
from tests.benchmarks.gate.project import Project, edit_graph, edit_graphs, graphs
from tests.benchmarks.gate.routing import constant, found
from tests.benchmarks.gate.weights import LLAMA, ROBERTA, T5, WHERE, values, weights


def half(value: Array) -> Array:
    """Return values that went through float16."""
    rounded: Array = value.astype(np.float16).astype(value.dtype)
    return rounded


def brain(value: Array) -> Array:
    """Return values cut to bfloat16."""
    bits = value.view(np.uint32) & np.uint32(0xFFFF0000)
    cut: Array = bits.view(np.float32)
    return cut


def eight_bits(value: Array) -> Array:
    """Return values rounded to 255 steps."""
    step = np.abs(value).max() / 127
    rounded: Array = (np.round(value / step) * step).astype(value.dtype)
    return rounded


def behind(
    model: ir.Model, name: str, make: Callable[[ir.Value], list[ir.Node]], *, end: bool = False
) -> None:
    """Put nodes behind a value; with ``end`` the graph's output of that name comes from them."""
    value = found(model, name)
    readers = [use.node for use in value.uses()]
    nodes = make(value)
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, nodes)
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(index, nodes[-1].outputs[0])
    if end:
        last = nodes[-1].outputs[0]
        value.name, last.name = f"{name}/before", name
        last.type = last.type or value.type
        last.shape = value.shape
        model.graph.outputs[[v is value for v in model.graph.outputs].index(True)] = last


def narrow(value: ir.Value) -> list[ir.Node]:
    """Round to float16 and back."""
    down = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
    return [down, ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT})]


def half_norm(project: Project) -> None:
    """One LayerNorm is computed in float16."""

    def change(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.name == "node_layer_norm_3")
        given = []
        for value in node.inputs:
            assert value is not None
            given.append(ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}))
        model.graph.insert_before(node, given)
        for index, cast in enumerate(given):
            node.replace_input_with(index, cast.outputs[0])
        output = node.outputs[0]
        readers = [use.node for use in output.uses()]
        back = ir.node("Cast", [output], {"to": ir.DataType.FLOAT})
        model.graph.insert_after(node, back)
        output.dtype = ir.DataType.FLOAT16
        for reader in readers:
            for index, read in enumerate(reader.inputs):
                if read is output:
                    reader.replace_input_with(index, back.outputs[0])

    edit_graphs(project.out / "onnx", change)


def overflow(project: Project) -> None:
    """A sum of squares leaves float16 and becomes infinite: what divides by it is zero."""

    def change(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "ReduceMean")
        name = node.outputs[0].name
        large = constant(model, "fault/large", np.array(1e7, np.float32))

        def make(value: ir.Value) -> list[ir.Node]:
            up = ir.node("Mul", [value, large])
            rounded = narrow(up.outputs[0])
            return [up, *rounded, ir.node("Div", [rounded[-1].outputs[0], large])]

        behind(model, str(name), make)

    edit_graphs(project.out / "onnx" / "title", change)


def approximate_gelu(project: Project) -> None:
    """GELU by tanh where the model's is exact."""

    def change(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Gelu":
                node.attributes["approximate"] = ir.AttrString("approximate", "tanh")

    edit_graphs(project.out / "onnx" / "topic", change)


def other_epsilon(project: Project) -> None:
    """LayerNorm's epsilon is 1e-4, not the model's 1e-12."""

    def change(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "LayerNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-4)

    edit_graphs(project.out / "onnx" / "spam", change)


def nan_token(project: Project) -> None:
    """The embedding of one token is NaN."""
    index = 41

    def change(value: Array) -> Array:
        value[index] = np.nan
        return value

    values("ads_rel", **{"roberta.embeddings.word_embeddings.weight": change})(project)


def half_output(project: Project) -> None:
    """The logits are float16."""
    edit_graphs(
        project.out / "onnx",
        lambda model: behind(
            model,
            "logits",
            lambda value: [_typed(ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}), 16)],
            end=True,
        ),
    )


def double_output(project: Project) -> None:
    """The logits are float64: the same numbers in memory that nobody expects."""
    edit_graphs(
        project.out / "onnx" / "spam",
        lambda model: behind(
            model,
            "logits",
            lambda value: [_typed(ir.node("Cast", [value], {"to": ir.DataType.DOUBLE}), 64)],
            end=True,
        ),
    )


def _typed(node: ir.Node, bits: int) -> ir.Node:
    dtype = {16: ir.DataType.FLOAT16, 64: ir.DataType.DOUBLE}[bits]
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def half_cache(project: Project) -> None:
    """The first graph hands its cache on rounded to float16."""

    def change(model: ir.Model) -> None:
        behind(model, "present.1.value", narrow, end=True)

    (prefill,) = [path for path in graphs(project.out / "onnx") if path.stem == "prefill"]
    edit_graph(prefill, change)


FAULTS = (
    Fault("fp16 overflow", "llama", ONE, overflow, "task title.*(error|NaN)"),
    Fault("LayerNorm in fp16", "roberta", ALL, half_norm, WHERE),
    Fault("one matrix rounded to fp16", "llama", ALL,
          values("", **{f"{LLAMA}.self_attn.o_proj.weight_t": half}), WHERE),
    Fault("one matrix cut to bf16", "t5", HF,
          weights("title", **{f"{T5}.layer.1.EncDecAttention.k.weight": brain}),
          "task title.*error"),
    Fault("one matrix in 8 bits", "t5", ONE,
          values("summary", **{f"{T5}.layer.2.DenseReluDense.wi_1.weight_t": eight_bits}),
          "task summary.*error"),
    Fault("cache in fp16", "llama", ALL, half_cache, "steps.*error"),
    Fault("GELU by tanh", "roberta", ONE, approximate_gelu, "task topic.*error"),
    Fault("LayerNorm's epsilon", "roberta", ONE, other_epsilon, "task spam.*error"),
    Fault("NaN in one token", "roberta", ONE, nan_token, "task ads_rel.*NaN"),
    Fault("wrong dtype: logits in fp16", "roberta", ALL, half_output, "float16|error"),
    Fault("wrong dtype: logits in fp64", "roberta", ONE, double_output,
          "task spam.*float64"),
    Fault("a norm's weight rounded to bf16", "roberta", HF,
          weights("topic", **{f"{ROBERTA}.output.LayerNorm.weight": brain}), "task topic.*error"),
)  # fmt: skip
