"""One task less in the graph of all tasks: its output, its head and its slices go.

In mode addition the shared stream sums over all tasks: the slices stay, the output and the head go.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mtl_export.bundle.edited import Edited
from mtl_export.bundle.manifest import FileEntry, OptionValue, Recipe, damage, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.bundle.staging import held_alone
from mtl_export.checkpoint.checkpoint import Task, task_named, tasks_of
from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.errors import IntegrityError, UsageError, shortened
from mtl_export.graph.external_data import save_graph
from mtl_export.graph.opened import open_graph
from mtl_export.graph.origins import EDITS_KEY, edits_of
from mtl_export.names import DENSE_KEY, MODEL_FILE, TASKS_KEY
from mtl_export.runtime.golden import GOLDEN_FILE, golden_bytes, read_golden
from mtl_export.version import VERSION

# Tensors with a slice for each task.
STACKED = (".task_down", ".task_up")
_FIX = "Export the graph again"


def is_dense(place: Path) -> bool:
    """Return whether a folder of ours, or the one that a file lies in, is of dense tasks."""
    folder = place if place.is_dir() else place.parent
    manifest = read_manifest(folder) if folder.is_dir() else None
    return manifest is not None and manifest.recipe.options.get("image_size") is not None


def remove_output(place: Path, name: str) -> Edited:
    """Cut a task out of the graph of all tasks at ``place``, a folder or its ``model.onnx``.

    Raises:
        TaskNotFoundError: The graph has no such task.
        UsageError: It is the only one.
        IntegrityError: The folder is not as it was written.
    """
    folder = place if place.is_dir() else place.parent
    with held_alone(folder.absolute().resolve()):
        manifest = read_manifest(folder)
        problems = damage(folder, manifest) if manifest else ["it has no manifest"]
        if manifest is None or problems:
            raise IntegrityError(
                f"{folder}: {shortened(problems)}",
                expected="the files that were written there",
                fix=_FIX,
            )
        model = open_graph(folder / MODEL_FILE)
        before = tasks_of(model.metadata_props.get(TASKS_KEY, "[]"), TASKS_KEY)
        after = without(model, before, name)
        names = [task.name for task in after]
        old = manifest.recipe
        options: dict[str, OptionValue] = {**old.options, "served": names}
        options["edits"] = list(edits_of(model.metadata_props))
        recipe = Recipe(old.command, options, old.sources, VERSION)
        with output_folder(folder, recipe=recipe, force=True, is_held=True) as plan:
            files = save_graph(model, plan.folder)
            plan.known.update({n: FileEntry(f.sha256, f.size_bytes) for n, f in files.items()})
            config = folder / "config.json"
            settings = parse_json(config.read_text(encoding="utf-8"), str(config), {str: object})
            text = json.dumps({**settings, "tasks": names}, indent=2) + "\n"
            (plan.folder / "config.json").write_text(text, encoding="utf-8")
            if GOLDEN_FILE in manifest.files:
                vectors = [one for one in read_golden(folder / GOLDEN_FILE) if one.name != name]
                (plan.folder / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
    return Edited(folder, before, after, ())


def without(model: ir.Model, tasks: tuple[Task, ...], name: str) -> tuple[Task, ...]:
    """Cut a task out of a graph; return those that it answers then.

    Raises:
        TaskNotFoundError: There is no such task.
        UsageError: It is the only one.
    """
    gone = task_named(tasks, name, of="graph", option="")
    if len(tasks) == 1:
        raise UsageError(
            f"task {name!r}: it is the graph's only task",
            expected="a task beside it",
            fix="Delete the folder instead",
        )
    graph = model.graph
    place = next(at for at, value in enumerate(graph.outputs) if value.name == name)
    del graph.outputs[place]
    RemoveUnusedNodesPass()(model)
    settings = parse_json(model.metadata_props[DENSE_KEY], DENSE_KEY, {str: object}, fix=_FIX)
    if settings["mode"] != "addition":
        _cut_streams(graph, gone.index)
    kept = [task for task in tasks if task != gone]
    after = tuple(dataclasses.replace(task, index=at) for at, task in enumerate(kept))
    settings["kinds"] = {k: v for k, v in settings["kinds"].items() if k != name}
    model.metadata_props[DENSE_KEY] = json.dumps(settings, sort_keys=True)
    model.metadata_props[TASKS_KEY] = json.dumps(
        [{"name": one.name, "index": one.index, "labels": [], "kind": one.kind} for one in after]
    )
    edits = [*edits_of(model.metadata_props), f"remove {name}"]
    model.metadata_props[EDITS_KEY] = json.dumps(edits)
    return after


def _cut_streams(graph: ir.Graph, gone: int) -> None:
    """Cut a task's slices out, and let the others' streams be taken by their new places."""
    for name, value in graph.initializers.items():
        if name.endswith(STACKED) and value.const_value is not None:
            kept = np.delete(value.const_value.numpy(), gone, axis=0)
            value.const_value = ir.tensor(kept, name=name)
            value.shape = ir.Shape(kept.shape)
    for node in list(graph):
        taken = _taken(node)
        if taken is None or taken <= gone:
            continue
        index = ir.Value(name=f"{node.outputs[0].name}.place", const_value=ir.tensor(taken - 1))
        graph.register_initializer(index)
        node.replace_input_with(1, index)
    shown = {id(value) for value in graph.outputs}
    for value in (one for node in graph for one in node.outputs if id(one) not in shown):
        value.shape = None  # the trace's, with a slice more


def _taken(node: ir.Node) -> int | None:
    """Return which stream a node takes out of those of all tasks; None if it is no such node."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    index = node.inputs[1]
    value = index.const_value if index is not None else None
    if value is None or value.numpy().ndim != 0 or not _is_of_streams(node.inputs[0]):
        return None
    return int(value.numpy())


def _is_of_streams(value: ir.Value | None, depth: int = 8) -> bool:
    """Return whether a value comes from a product with a tensor that has a slice for each task."""
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return False
    names = [one.name or "" for one in node.inputs if one is not None]
    if any(name.endswith(STACKED) for name in names):
        return True
    return any(_is_of_streams(one, depth - 1) for one in node.inputs)
