"""From one trace to any number of graphs that a stock runtime can run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint import sentence_embedding
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.graph import shared_tensors
from mtl_export.graph.adapter_parameters import Parameter
from mtl_export.graph.passes.adapter_input import AdapterInputPass
from mtl_export.graph.passes.composed_up import ComposedUpPass
from mtl_export.graph.passes.constants import ConstantTensorsPass
from mtl_export.graph.passes.guard_outputs import GuardOutputsPass
from mtl_export.graph.passes.joint_gemm import JointGemmPass
from mtl_export.graph.passes.markers import ensure_no_markers
from mtl_export.graph.passes.merge_task import MergeTaskPass
from mtl_export.graph.passes.own_output import OwnOutputPass
from mtl_export.graph.passes.pool_states import PoolStatesPass
from mtl_export.graph.passes.route_embeddings import RouteEmbeddingsPass
from mtl_export.graph.passes.route_norms import RouteNormsPass
from mtl_export.graph.passes.route_tasks import RouteTasksPass
from mtl_export.graph.passes.routing import TaskInput
from mtl_export.graph.passes.shared_cores import SharedCoresPass
from mtl_export.graph.passes.shared_down import SharedDownPass
from mtl_export.graph.passes.weights import mark_common
from mtl_export.graph.trace import TracedModel
from mtl_export.names import (
    ADAPTER_INPUT,
    BASE_KEY,
    CHECKPOINT_KEY,
    FAMILY_KEY,
    LAYOUT_KEY,
    PER_TASK,
    SINGLE_GRAPH,
    SIZES_KEY,
    TASK_INPUT_KEY,
    TASKS_KEY,
    VERSION_KEY,
)
from mtl_export.version import VERSION


def merged_graph(
    traced: TracedModel,
    bound: BoundModel,
    task: Task,
    *,
    embedding: SentenceEmbedding | None = None,
) -> ir.Model:
    """Return the graph of ``task`` alone, its weights merged.

    Args:
        traced: The base.
        bound: The adapters.
        task: The task.
        embedding: Pool the hidden states of a bare encoder so, and give both; None keeps its
            outputs.

    Raises:
        GraphError: There are no hidden states to pool.
    """
    # Alone in its graph the task needs no output of its own name.
    metadata = _metadata(bound, PER_TASK, (replace(task, output=""),))
    lowering: list[ir.passes.InPlacePass] = [MergeTaskPass(bound, task), OwnOutputPass(task)]
    if embedding is not None:
        lowering.append(PoolStatesPass(embedding, keep_states=True))
    return _lowered(traced, lowering, metadata, embedding)


def routed_graph(
    traced: TracedModel,
    bound: BoundModel,
    *,
    task_input: TaskInput = "rows",
    embedding: SentenceEmbedding | None = None,
) -> ir.Model:
    """Return the graph of all tasks, with the extra input ``task_ids``.

    Args:
        traced: The base.
        bound: The adapters.
        task_input: ``rows``: int64 [batch], each row's task. ``scalar``: int64 [1], one task
            for the whole batch.
        embedding: Pool the hidden states of a bare encoder so; None keeps its outputs.

    Raises:
        GraphError: It is not known which rows of the batch a layer's rows belong to, or
            there are no hidden states to pool.
    """
    metadata = _metadata(bound, SINGLE_GRAPH, bound.adapters.tasks)
    metadata[TASK_INPUT_KEY] = task_input
    metadata[shared_tensors.METADATA] = shared_tensors.replaced_json(bound.adapters)
    # Embeddings first: they may widen what linear layers take from [1, S, I] to [B, S, I].
    passes: list[ir.passes.InPlacePass] = [
        RouteEmbeddingsPass(bound, task_input),
        RouteTasksPass(bound, task_input),
        RouteNormsPass(bound, task_input),
    ]
    passes += [SharedDownPass(), SharedCoresPass(), JointGemmPass(), ComposedUpPass()]
    passes += [GuardOutputsPass()]
    passes += [PoolStatesPass(embedding)] if embedding is not None else []
    return _lowered(traced, passes, metadata, embedding)


def adapter_input_graph(
    traced: TracedModel, bound: BoundModel
) -> tuple[ir.Model, tuple[Parameter, ...]]:
    """Return the graph that takes one task's tensors as optional inputs, and these inputs.

    Raises:
        GraphError: One task adapts a layer that another replaces.
    """
    metadata = _metadata(bound, ADAPTER_INPUT, bound.adapters.tasks)
    lowering = AdapterInputPass(bound)
    model = _lowered(traced, [lowering], metadata, None)
    kept = {value.name for value in model.graph.inputs}
    return model, tuple(one for one in lowering.parameters if one.name in kept)


def inlined(model: ir.Model) -> None:
    """Put the nodes of every function in the place of its calls."""
    for step in (common.InlinePass(), common.RemoveUnusedOpsetsPass()):
        step(model)


def _lowered(
    traced: TracedModel,
    lowering: Sequence[ir.passes.InPlacePass],
    metadata: dict[str, str],
    embedding: SentenceEmbedding | None,
) -> ir.Model:
    if embedding is not None:
        metadata[sentence_embedding.METADATA_KEY] = embedding.to_json()
    mark_common(traced.model)
    model = traced.model.clone()
    # One by one: ir.passes.Sequential would hide our own errors inside its PassError.
    cleaning = (common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass())
    for step in (*lowering, ConstantTensorsPass(), *cleaning):
        model = step(model).model
    ensure_no_markers(model)
    model.metadata_props.update(metadata)
    model.producer_name, model.producer_version = "mtl-export", VERSION
    model.graph.name = metadata[LAYOUT_KEY]
    return model


def _metadata(bound: BoundModel, layout: str, tasks: tuple[Task, ...]) -> dict[str, str]:
    """Return what the file says of itself; the keys are part of the format."""
    adapters = bound.adapters
    cores = {
        block.core.shape
        for layer in adapters.layers.values()
        for task in tasks
        if (block := layer.factors(task.index)) is not None
    }
    sizes = {"layers": len(adapters.layers), "core_shapes": sorted(cores)}
    table = [task.as_entry() for task in tasks]
    return {
        VERSION_KEY: VERSION,
        LAYOUT_KEY: layout,
        FAMILY_KEY: adapters.family,
        TASKS_KEY: json.dumps(table),
        BASE_KEY: bound.base.sha256,
        CHECKPOINT_KEY: adapters.checkpoint_sha256,
        SIZES_KEY: json.dumps(sizes),
    }
