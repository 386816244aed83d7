"""One forward pass of a PyTorch model as a graph whose sizes and inputs have names.

    {"past.0.key": tensor}, {"past.0.key": {0: "batch", 2: "past"}}
        ->  the model is called with past={"0": {"key": tensor}};
            the graph has the input "past.0.key" [batch, heads, past, size]

Inputs whose names have dots reach the model as nested dicts, because Python's parameters
have no dots.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch

from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.sampling import reason_of

# From the next on PyTorch writes all of an attention as one node, which half precision,
# quantising and runtimes' own fusions know nothing of.
NEWEST_TRACED = 22
# No batch is larger, and no sequence longer where the model says nothing.
LARGEST_BATCH, LONGEST = 2**20, 2**15
ONE_MORE = " + 1"
# Where the exporter's optimiser says what a constant was computed from.
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
# By input: the names of the axes whose size may vary, by number.
Axes = Mapping[str, Mapping[int, str]]


def exported(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    axes: Axes,
    longest: Mapping[str, int] | None = None,
    *,
    defer: bool = False,
    opset: int = names.OPSET,
) -> ir.Model:
    """Return the graph of ``model(**inputs)``.

    Args:
        model: A transformers model, or one whose ``forward`` returns tensors by name.
        inputs: Sample inputs by name, in the order the graph takes them.
        axes: Which of their sizes may vary; axes of one name are always of one size. An axis
            called ``past + 1`` is one longer than one called ``past``.
        longest: The largest size of an axis by name; 2^15 for those left out.
        defer: Do without the proof that every size fits, which PyTorch cannot give for keys
            and values that several heads share.
        opset: What to write it in.

    Raises:
        GraphError: The exporter cannot trace the model, or lost an input, or the model computes
            in another type than its weights'.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    limits = {names.BATCH: LARGEST_BATCH, **(longest or {})}
    wanted = {axis for by_number in axes.values() for axis in by_number.values()}
    sizes: dict[str, Any] = {
        axis: torch.export.Dim(axis, min=1, max=limits.get(axis, LONGEST))
        for axis in sorted({axis.removesuffix(ONE_MORE) for axis in wanted})
    }
    sizes |= {axis: sizes[axis.removesuffix(ONE_MORE)] + 1 for axis in wanted - sizes.keys()}
    shapes = {
        name: {number: sizes[axis] for number, axis in axes.get(name, {}).items()}
        for name in inputs
    }
    config = OnnxConfig(
        dynamic_shapes=nested(shapes),
        opset_version=min(opset, NEWEST_TRACED),
        prefer_deferred_runtime_asserts_over_guards=defer,
    )
    try:
        with _quiet_exporter():
            result: Any = OnnxExporter().export(model, nested(inputs), config=config)
    except Exception as error:
        # torch.export and torch.onnx raise many unrelated types; all mean the same to the user.
        reason = reason_of(error)
        fix = "Merge per task instead (mtl-export merge), or report the model class"
        if "padding token" in reason:  # classifiers that find each row's last token by it
            fix = "Set pad_token_id in config.json of the base"
        raise GraphError(
            f"{type(model).__name__}: the ONNX exporter gave up: {reason}",
            expected="a model that torch.export can trace with a dynamic batch and sequence",
            fix=fix,
        ) from error
    # transformers 5.20, the newest for Python 3.10, returns torch's own ONNXProgram.
    graph_model: ir.Model = getattr(result, "program", None) or result.model
    _bring_to_opset(graph_model, opset, type(model).__name__)
    _refuse_narrow(graph_model, type(model).__name__)
    _name_inputs(graph_model, tuple(_flat(nested(inputs))), type(model).__name__)
    _name_dimensions(graph_model, axes)
    _name_transposed(graph_model)
    return graph_model


def _bring_to_opset(model: ir.Model, opset: int, model_class: str) -> None:
    """Raise a trace to ``opset``, and say which version of the file format that came with.

    Raises:
        GraphError: The exporter, which falls back without a word, wrote another.
    """
    if opset > NEWEST_TRACED:
        from onnxscript.version_converter import convert_version

        convert_version(model, opset)
    if model.opset_imports[""] != opset:
        raise GraphError(
            f"{model_class}: opset {model.opset_imports['']} from the exporter",
            expected=f"opset {opset}",
            fix=f"Leave out --opset, which is {names.OPSET} then",
        )
    if opset != names.OPSET:
        from onnx.helper import find_min_ir_version_for, make_opsetid

        model.ir_version = find_min_ir_version_for([make_opsetid("", opset)])


def _refuse_narrow(model: ir.Model, model_class: str) -> None:
    """Refuse a trace of float32 weights that goes through fewer bits, as some biases do."""
    narrow = {ir.DataType.BFLOAT16, ir.DataType.FLOAT16}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.dtype in narrow:
                raise GraphError(
                    f"{model_class}: {value.dtype} at {node.name} ({node.op_type}) of its float32 "
                    "trace",
                    expected=(
                        "a model that computes in the type of its weights, because onnxruntime "
                        "has no such kernels on a CPU"
                    ),
                    fix="Merge per task instead (mtl-export merge)",
                )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for ``{"a.b": value}``."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` for ``{"a": {"b": value}}``, in the order of the exporter."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def _name_inputs(model: ir.Model, expected: tuple[str, ...], model_class: str) -> None:
    found = model.graph.inputs
    if len(found) != len(expected):
        raise GraphError(
            f"{model_class}: a graph with the inputs "
            f"{shortened(str(value.name) for value in found)}",
            expected=(
                f"the inputs {shortened(expected)}, because an input that the exporter drops could "
                "not be fed"
            ),
            fix="Merge per task instead (mtl-export merge), or report the model class",
        )
    for value, name in zip(found, expected, strict=True):
        value.name = name


def _name_dimensions(model: ir.Model, axes: Axes) -> None:
    """Give the exporter's symbols (s18, s41) the names that users and builders read."""
    renamed: dict[re.Pattern[str], str] = {}
    for value in model.graph.inputs:
        if value.shape is None:
            raise GraphError(f"graph input {value.name}: no shape", expected="[batch, ...]")
        for number, axis in axes.get(str(value.name), {}).items():
            dim = value.shape[number]
            if isinstance(dim, ir.SymbolicDim) and not axis.endswith(ONE_MORE):
                renamed[re.compile(rf"\b{re.escape(str(dim.value))}\b")] = axis
    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is None:
            continue
        dims: list[int | ir.SymbolicDim | str | None] = []
        for dim in value.shape:
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                text = str(dim.value)
                for symbol, name in renamed.items():
                    text = symbol.sub(name, text)
                dims.append(text)
            else:
                dims.append(dim)
        value.shape = ir.Shape(dims)


def _name_transposed(model: ir.Model) -> None:
    """Name weights that were transposed ahead of time after what they were: ``.weight_t``.

    The exporter numbers them, differently in each part of a model.
    """
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        sources = ast.literal_eval(value.metadata_props.get(FOLDED_FROM, "[]"))
        if len(sources) != 1 or value.shape is None or len(value.shape) != 2:
            continue
        module, _, kind = sources[0].rpartition(".")
        name = names.weight_t(module)
        if kind == "weight" and name not in initializers:
            value.name = name


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's chatter (version notes, torchvision, progress) off the terminal."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with (
            quiet_transformers(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
