"""A folded Swin -> one ONNX graph: an image in, one output per task.

The graph has the names that parity looks for: ``stage<s>.shared``, the tokens that a stage passes
on, and ``stage<s>.<task>``, the map that a task's head reads. What no output needs is left out.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from mtl_export.adapters.modules.mtlora_swin import Block, MTLoRASwin
from mtl_export.dense.kinds import kind_of, postprocessed
from mtl_export.dense.model import DenseModel
from mtl_export.errors import GraphError
from mtl_export.graph.external_data import WrittenFile, save_graph
from mtl_export.graph.names import OPSET
from mtl_export.names import (
    BASE_KEY,
    CHECKPOINT_KEY,
    DENSE_KEY,
    DTYPE_KEY,
    FAMILY_KEY,
    IMAGE,
    LAYOUT_KEY,
    SINGLE_GRAPH,
    TASKS_KEY,
    VERSION_KEY,
)
from mtl_export.runtime.images import MEAN, STD
from mtl_export.version import VERSION

# The batch of the trace: with 1 a dynamic axis would be taken for a constant.
TRACED_BATCH = 2
# Of a node's scopes, the modules of the model: 'inner.backbone.layers.0', ...
_MODULE = re.compile(r"'inner\.((?:backbone|downsampler|decoders)[\w.]*)'")


class _Tapped(nn.Module):
    """The model, with the tokens and maps of every stage beside its outputs."""

    def __init__(self, model: MTLoRASwin, *, is_postprocessed: bool) -> None:
        super().__init__()
        self.inner, self.is_postprocessed = model, is_postprocessed

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return outputs by task, then shared tokens by stage, then maps by task and stage."""
        features = self.inner.backbone(image)
        maps = self.inner.maps(features)
        outputs = self.inner.answers(maps)
        if self.is_postprocessed:
            outputs = {task: postprocessed(task, value) for task, value in outputs.items()}
        taps = [one.shared for one in features] + [one for own in maps.values() for one in own]
        return (*outputs.values(), *taps)


def tap_names(tasks: Sequence[str], stages: int) -> list[str]:
    """Return the names of what a graph shows of its inside, in the order of ``_Tapped``."""
    shared = [f"stage{stage}.shared" for stage in range(stages)]
    return shared + [f"stage{stage}.{task}" for task in tasks for stage in range(stages)]


def write_dense_graph(
    model: DenseModel,
    tasks: Sequence[str],
    folder: Path,
    layout: str,
    *,
    opset: int = OPSET,
    is_postprocessed: bool = False,
) -> dict[str, WrittenFile]:
    """Write ``model.onnx``, its data and ``config.json`` to an existing folder.

    ``config.json`` says how images are prepared: the side in pixels, and mean and deviation of
    each channel after division by 255. See ``dense_graph`` for the rest.

    Returns:
        Hash and size of the data file, by name.
    """
    graph = dense_graph(model, tasks, layout, opset=opset, is_postprocessed=is_postprocessed)
    config = {
        "tasks": list(tasks),
        "image_size": model.described.image_size,
        "mean": MEAN,
        "std": STD,
        "postprocessed": is_postprocessed,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return save_graph(graph, folder)


def dense_graph(
    model: DenseModel,
    tasks: Sequence[str],
    layout: str = SINGLE_GRAPH,
    *,
    opset: int = OPSET,
    is_postprocessed: bool = False,
) -> ir.Model:
    """Return the graph that answers ``tasks``, with a dynamic batch.

    Args:
        model: As trained, at the size of image wanted.
        tasks: In the order of the outputs; tensors of others are not in the graph.
        layout: ``single-graph`` or ``per-task``, for its metadata.
        opset: Of the graph.
        is_postprocessed: Put argmax, sigmoid or normalisation into the graph; see ``kinds``.

    Raises:
        GraphError: PyTorch cannot export it, or a task is called as the input is.
    """
    if IMAGE in tasks:
        raise GraphError(
            f"task {IMAGE}: the graph's input has that name",
            expected="outputs named after tasks, and another name for the input",
            fix=f"Rename the task {IMAGE} in the checkpoint's keys and TASKS",
        )
    tensors, described = model.folded(tasks)
    inner = MTLoRASwin.from_tensors(tensors, described)
    freeze_biases(inner)
    size, stages = described.image_size, len(inner.backbone.layers)
    names = [*tasks, *tap_names(tasks, stages)]
    with _quiet():
        program = torch.onnx.export(
            _Tapped(inner, is_postprocessed=is_postprocessed),
            (torch.zeros(TRACED_BATCH, 3, size, size),),
            dynamo=True,
            input_names=[IMAGE],
            output_names=names,
            dynamic_shapes={IMAGE: {0: torch.export.Dim("batch")}},
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise GraphError(
            f"{model.checkpoint.path}: PyTorch gives no graph",
            expected="a graph from torch.onnx.export",
            fix="Install the torch that the README names",
        )
    graph = program.model
    del graph.graph.outputs[len(tasks) :]
    RemoveUnusedNodesPass()(graph)
    _name_by_module(graph.graph)
    graph.metadata_props.clear()
    graph.metadata_props.update(_metadata(model, tasks, layout, is_postprocessed=is_postprocessed))
    return graph


def _name_by_module(graph: ir.Graph) -> None:
    """Name weights after their modules, and drop what the exporter says of this machine's files."""
    names = {name: name.removeprefix("inner.") for name in graph.initializers}
    for node in graph:
        scopes = _MODULE.findall(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        own = str(weight.name) if weight is not None and weight.is_initializer() else ""
        name = f"{scopes[-1]}.weight_t" if scopes else ""
        if own and "." not in own and name and name not in names.values():
            names[own] = name
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for old, new in names.items():
        value = graph.initializers.pop(old)
        value.name = new
        graph.register_initializer(value)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()


def freeze_biases(model: MTLoRASwin) -> None:
    """Compute what attention adds to its scores once: table and mask in one constant."""
    for block in model.modules():
        if isinstance(block, Block):
            block.attn.attn_bias = block.attn.bias(block.attn_mask).detach()


def _metadata(
    model: DenseModel, tasks: Sequence[str], layout: str, *, is_postprocessed: bool
) -> dict[str, str]:
    chosen = [task for task in model.tasks if task.name in tasks]
    dense = {
        "image_size": model.described.image_size,
        "postprocessed": is_postprocessed,
        "mode": model.described.mode,
        "kinds": {task.name: kind_of(task.name) for task in chosen},
    }
    return {
        VERSION_KEY: VERSION,
        LAYOUT_KEY: layout,
        FAMILY_KEY: model.checkpoint.family,
        DTYPE_KEY: "fp32",
        TASKS_KEY: json.dumps([{"name": one.name, "index": one.index, "labels": [],
                                "kind": one.kind} for one in chosen]),
        BASE_KEY: model.checkpoint.sha256,
        CHECKPOINT_KEY: model.checkpoint.sha256,
        DENSE_KEY: json.dumps(dense, sort_keys=True),
    }  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of itself from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
