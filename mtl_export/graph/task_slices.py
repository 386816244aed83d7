"""One task of a checkpoint -> the slices that a routed graph's stacks would have for it.

The slices are made as ``passes.stacks`` makes them. Nothing of the base is read, so a task
that keeps the base's own where others have theirs (a bias, a norm) is refused: the graph does
not tell what the base's is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mtl_export.adapters.normal_form import NO_LABEL, AdapterSet, AnyAdapter, LayerAdapter
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, IntegrityError, shortened
from mtl_export.graph import names
from mtl_export.graph.passes.stacks import absences
from mtl_export.graph.shared_tensors import is_same, is_stacked, replaced_otherwise
from mtl_export.graph.stacks_on_disk import Stack, as_stored
from mtl_export.names import BASE_KEY, FAMILY_KEY

_EXPORT = "Export the graph again with the new task in the checkpoint"


def new_slice(stack: Stack, adapters: AdapterSet, task: Task) -> Array:
    """Return what ``stack`` has for ``task``: float64, or as it was trained.

    Raises:
        AdapterError: The checkpoint does not say.
    """
    layer = adapters.layers.get(stack.module)
    heads = adapters.heads.get(stack.module)
    if heads is not None and stack.part in {"weights", "biases"}:
        head = heads[task.index]
        return head.weight.T if stack.part == "weights" else head.bias
    if layer is not None and stack.part == "core" and isinstance(layer, LayerAdapter):
        return np.asarray(layer.core[task.index].T)
    if stack.part in {"downs", "ups"} and stack.block == 1:
        return _own_factor(stack, layer, task)
    if stack.part == "gain":
        gain = None if layer is None else layer.gain
        return np.ones(stack.shape[1:]) if gain is None else np.asarray(gain[task.index])
    if stack.part == "absent" and stack.module in adapters.bare_outputs:
        return np.asarray(absences(adapters, stack.module)[task.index])
    kind = {"biases": "bias", "weights": "weight"}.get(stack.part)
    own = adapters.replacement(f"{stack.module}.{kind}", task.index) if kind else None
    if own is not None and own.ndim == len(stack.shape) - 1 == 1:
        return own
    raise AdapterError(
        f"{stack.module}: the graph's tasks have their own {stack.part}, the new task's is not "
        "known",
        expected=(
            "a task that trained the same parts of the model, because the base's own is not in "
            "the graph"
        ),
        fix=_EXPORT,
    )


def is_slice(stack: Stack, own: Array, stored: Array) -> bool:
    """Return whether ``stored`` is ``own``, as ``new_slice`` gives it, in the stack's dtype."""
    own = as_stored(own, stack.tensor.dtype)
    room = stored.shape[-1] - own.shape[-1]
    fill = NO_LABEL if stack.part == "biases" else 0.0
    padded = np.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, room)], constant_values=fill)
    return np.array_equal(padded, stored)


def _own_factor(stack: Stack, layer: AnyAdapter | None, task: Task) -> Array:
    """Return down^T ``[I, R]`` or (up . core)^T ``[R, O]``, padded to the graph's rank."""
    factors = None if layer is None else layer.factors(task.index)
    own = np.zeros(stack.shape[1:])
    if factors is None:
        return own
    is_down = stack.part == "downs"
    value = factors.down.T if is_down else (factors.up.astype(np.float64) @ factors.core).T
    room = stack.shape[2] if is_down else stack.shape[1]
    rank = value.shape[1] if is_down else value.shape[0]
    if rank > room:
        raise AdapterError(
            f"{stack.module}: rank {rank}",
            expected=(
                f"at most {room}, the highest rank of the graph's tasks, because wider stacks "
                "would change how the other tasks' sums are rounded"
            ),
            fix=_EXPORT,
        )
    target = own[:, :rank] if is_down else own[:rank]
    if target.shape != value.shape:
        raise _shape_error(stack, value)
    target[...] = value
    return own


def refuse_misfit(
    models: Mapping[str, ir.Model],
    by_stem: Mapping[str, Sequence[Stack]],
    adapters: AdapterSet,
    task: Task,
) -> None:
    """Refuse a task that does not share what the graph's tasks share.

    Raises:
        AdapterError: Another family, another down- or up-projection, another shape, or parts
            that the graph has no place for.
        IntegrityError: The checkpoint names another base.
    """
    model = next(iter(models.values()))
    family = model.metadata_props.get(FAMILY_KEY, "")
    problems = [] if adapters.family == family else [f"family {adapters.family}, not {family}"]
    places = {(stack.module, stack.part) for stacks in by_stem.values() for stack in stacks}
    problems += _without_place(adapters, task, places)
    problems += replaced_otherwise(adapters, models, places)
    for stem, stacks in by_stem.items():
        initializers = models[stem].graph.initializers
        for stack in stacks:
            if stack.part == "core":
                problems += _factors_differ(stack, adapters, initializers)
    if problems:
        raise AdapterError(
            f"task {task.name!r} of the new checkpoint: {shortened(dict.fromkeys(problems))}",
            expected=(
                "the family, projections and trained tensors that the graph's tasks share, "
                "because a task adds its own slices to the graph and changes nothing else"
            ),
            fix=_EXPORT,
        )
    for stacks in by_stem.values():
        for stack in stacks:
            is_head = stack.module in adapters.heads
            _check_shape(stack, new_slice(stack, adapters, task), is_head=is_head)


def refuse_other_base(models: Mapping[str, ir.Model], sha256: str) -> None:
    """Refuse a checkpoint that was trained on another base than the graph's.

    Raises:
        IntegrityError: It says so.
    """
    expected = next(iter(models.values())).metadata_props.get(BASE_KEY, "")
    if sha256 and sha256 != expected:
        raise IntegrityError(
            f"the new checkpoint's base: SHA-256 {sha256}",
            expected=(
                f"{expected}, the base of the graph, because the task was trained on another model"
            ),
            fix="Train the task on the graph's base",
        )


def _without_place(adapters: AdapterSet, task: Task, places: set[tuple[str, str]]) -> Iterator[str]:
    modules = {module for module, _ in places}
    for module, layer in adapters.layers.items():
        factors = layer.factors(task.index)
        is_adapted = bool({(module, "core"), (module, "downs")} & places)
        if not is_adapted and factors is not None and factors.core.any():
            yield f"layer {module}, which no task of the graph adapts"
        has_gain = layer.gain is not None and (layer.gain[task.index] != 1).any()
        if has_gain and (module, "gain") not in places:
            yield f"gains of {module}, which no task of the graph has"
        if layer.bias is not None and (module, "biases") not in places:
            yield f"its own bias of {module}, which the graph's tasks share"
    for module in adapters.heads:
        if module not in modules:
            yield f"head {module}, which the graph does not have"
    for name in adapters.own_tensors:
        whole = adapters.task_replaced.get(name)
        rows = adapters.own_rows(name, task.index)
        has_own = (whole and whole[task.index] is not None) or rows is not None
        if has_own and not is_stacked(name, places):
            yield f"its own {name}, which the graph's tasks share"


def _factors_differ(
    stack: Stack, adapters: AdapterSet, initializers: Mapping[str, ir.Value]
) -> Iterator[str]:
    layer = adapters.layers.get(stack.module)
    if not isinstance(layer, LayerAdapter):
        yield f"no adapter of {stack.module}"
        return
    for name, own in (("down", layer.down.T), ("up", layer.up.T)):
        value = initializers.get(names.part(stack.module, name))
        tensor = None if value is None else value.const_value
        if tensor is None or not is_same(tensor, own):
            yield f"another {name}-projection of {stack.module}"


def _check_shape(stack: Stack, own: Array, *, is_head: bool) -> None:
    expected = stack.shape[1:]
    # Heads may be of any width.
    if own.shape != expected and not (is_head and own.shape[:-1] == expected[:-1]):
        raise _shape_error(stack, own)


def _shape_error(stack: Stack, own: Array) -> AdapterError:
    return AdapterError(
        f"{stack.module}.{stack.part}: the new task's is {list(own.shape)}",
        expected=f"{list(stack.shape[1:])}, because all tasks share the shapes of the model",
        fix="Train the task on the graph's base",
    )
