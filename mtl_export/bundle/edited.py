"""A finished folder of single graphs with one task added, removed or renamed.

All parts of the model (``prefill`` and ``decode``) change together: they are written beside
the folder and put in its place in one step, with everything else that lay in it. The folder is
held from reading its manifest to that step: a second edit meanwhile is refused. The manifest
keeps its recipe and says what was done, under these options

    edits         one phrase for every edit
    unverified    tasks whose rows no comparison has seen: those that were added

An edit that was done is not done twice: a command that was killed after its end, or is typed
again, finds the folder up to date, as long as no later edit was about the same names.

Golden vectors are kept for every other task: their rows answer as before, so ``verify`` still
holds the folder against what parity found. Their ids follow the tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mtl_export.bundle.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    OptionValue,
    Recipe,
    damage,
    read_manifest,
)
from mtl_export.bundle.output import output_folder
from mtl_export.bundle.staging import held_alone
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError, IntegrityError, UsageError, shortened
from mtl_export.graph.external_data import externalised, write_data
from mtl_export.graph.opened import open_graph
from mtl_export.graph.task_edit import task_table, vector_ids
from mtl_export.names import CHECKPOINT_KEY, DATA_FILE
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, golden_bytes, read_golden
from mtl_export.version import VERSION

Edit = Callable[[dict[str, ir.Model]], tuple[Task, ...]]


@dataclass(frozen=True)
class Edited:
    """What an edit made of a folder.

    Attributes:
        folder: The folder.
        before: The tasks it served.
        after: The tasks it serves.
        unverified: Those whose rows no comparison has seen, by name.
        up_to_date: The edit was done before, and nothing was written.
    """

    folder: Path
    before: tuple[Task, ...]
    after: tuple[Task, ...]
    unverified: tuple[str, ...]
    up_to_date: bool = False


def edit_folder(place: Path, edit: Edit, note: str, *, added: str = "", removed: str = "",
                renamed: tuple[str, str] = ("", "")) -> Edited:  # fmt: skip
    """Edit the graphs at ``place`` and put the result there.

    Args:
        place: The folder, or one of the graphs in it.
        edit: Changes the graphs, by stem, and returns the tasks they serve then; those they
            served before where the edit was done already.
        note: What the edit is, for the manifest.
        added: The task that no comparison has seen.
        removed: The task that is gone.
        renamed: Old and new name.

    Raises:
        UsageError: There is no graph.
        IntegrityError: The folder is not as it was written.
        GraphError: The graphs are not single graphs, or were changed by something else.
        OutputError: Another run writes there, an edit among them.
    """
    is_graph = place.suffix == ".onnx" and not place.is_dir()
    folder = place.parent if is_graph else place
    # The graphs' weights are read as they are written: no other run may swap the folder till then.
    with held_alone(folder.absolute().resolve()):
        manifest = _manifest_of(folder)
        if is_graph and place.name not in manifest.files:
            raise UsageError(
                f"{place}: {'not written by mtl-export' if place.exists() else 'no such file'}",
                expected=(
                    f"one of {shortened(name for name in manifest.files if _is_graph(name))}"
                ),
                fix=f"Pass the folder, {folder}: all its graphs change together",
            )
        names = dict([renamed]) if renamed[0] else {}
        return _edited(folder, manifest, edit, note, added, removed, names)


def _edited(
    folder: Path,
    manifest: Manifest,
    edit: Edit,
    note: str,
    added: str,
    removed: str,
    renamed: Mapping[str, str],
) -> Edited:
    """Edit the graphs of ``folder``, which is held, and put the result in its place."""
    stems = sorted(Path(name).stem for name in manifest.files if _is_graph(name))
    models = {stem: open_graph(folder / f"{stem}.onnx") for stem in stems}
    before = task_table(models)
    done = _is_done(note, _names(manifest, "edits"), {task.name for task in before})
    after = before if done else edit(models)
    if after == before:
        return Edited(folder, before, after, tuple(_names(manifest, "unverified")), up_to_date=True)
    names = {old.name: renamed.get(old.name, old.name) for old in before if old.name != removed}
    unverified = _names(manifest, "unverified")
    unverified = [names[name] for name in unverified if name in names] + ([added] if added else [])
    recipe = _recipe(manifest.recipe, models, after, note, unverified)
    with output_folder(folder, recipe=recipe, force=True, is_held=True) as plan:
        places, files = write_data(models, plan.folder)
        with externalised(models, places):
            for stem, model in models.items():
                _save(model, plan.folder / f"{stem}.onnx", folder)
        data = files[DATA_FILE]
        plan.known[DATA_FILE] = FileEntry(data.sha256, data.size_bytes)
        written = {DATA_FILE, *(f"{stem}.onnx" for stem in stems)}
        for name in manifest.files.keys() - written - {GOLDEN_FILE}:
            if not name.endswith(".onnx.data"):
                (plan.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, plan.folder / name)
        if GOLDEN_FILE in manifest.files:
            vectors = _followed(read_golden(folder / GOLDEN_FILE), before, after, removed, names)
            vectors = _widened(vectors, models)
            if vectors:
                (plan.folder / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
        _check(plan.folder, stems)
    return Edited(folder, before, after, tuple(unverified))


def _save(model: ir.Model, path: Path, source: Path) -> None:
    """Write one graph.

    Raises:
        GraphError: The graph that was read holds something that no ONNX file can.
    """
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as error:
        raise GraphError(
            f"{source / path.name}: it cannot be written again ({str(error)[:200]})",
            expected="a graph that mtl-export onnx wrote",
            fix="Export it again with --force",
        ) from error


def _is_done(note: str, edits: Sequence[str], tasks: set[str]) -> bool:
    """Return whether ``note`` removes or renames what it did already, and nothing since did."""
    names = _about(note)
    last = [edit for edit in edits if names & _about(edit)][-1:]
    old, new = {*note.split()[1:2]}, {*note.split()[2:]}
    return last == [note] and not old & tasks and new <= tasks


def _about(edit: str) -> set[str]:
    """Return the names that an edit gives or takes: of an added task not what it is made from."""
    words = edit.split()
    return {*words[1:]} if words[:1] == ["rename"] else {*words[1:2]}


def _is_graph(name: str) -> bool:
    return name.endswith(".onnx")


def _manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or not any(_is_graph(name) for name in manifest.files):
        raise UsageError(
            f"{folder}: {'not written by mtl-export' if folder.exists() else 'no such folder'}",
            expected=f"a folder with model.onnx and {MANIFEST_FILE}",
            fix="Pass the folder that mtl-export onnx --all-tasks wrote, such as out/onnx",
        )
    problems = damage(folder, manifest)
    if problems:
        raise IntegrityError(
            f"{folder}: {shortened(problems)}",
            expected=(
                "the files that were written there, because an edit of a changed graph would make "
                "it look whole"
            ),
            fix="Export it again",
        )
    return manifest


def _names(manifest: Manifest, option: str) -> list[str]:
    value = manifest.recipe.options.get(option)
    return list(value) if isinstance(value, list) else []


def _recipe(
    old: Recipe,
    models: dict[str, ir.Model],
    tasks: Sequence[Task],
    note: str,
    unverified: list[str],
) -> Recipe:
    names = [task.name for task in tasks]
    options: dict[str, OptionValue] = {
        **old.options,
        "tasks": names,
        "served": names,
        "edits": [*_texts(old.options.get("edits")), note],
        "unverified": unverified,
    }
    checkpoint = next(iter(models.values())).metadata_props[CHECKPOINT_KEY]
    return Recipe(old.command, options, {**old.sources, "checkpoint_sha256": checkpoint}, VERSION)


def _texts(value: OptionValue) -> list[str]:
    return list(value) if isinstance(value, list) else []


def _check(folder: Path, stems: Sequence[str]) -> None:
    """Refuse to put in place what onnx would not take.

    Raises:
        GraphError: A graph fails the full check.
    """
    import onnx

    for stem in stems:
        path = folder / f"{stem}.onnx"
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:  # its types are made by pybind and share no base
            raise GraphError(
                f"{path.name}: the edited graph fails onnx's check ("
                f"{str(error).strip().splitlines()[0]})",
                expected="a graph as mtl-export onnx writes it",
                fix="Export the graph again with the tasks you want; nothing was changed",
            ) from error


def _followed(
    vectors: Sequence[Vector],
    before: Sequence[Task],
    after: Sequence[Task],
    removed: str,
    names: dict[str, str],
) -> list[Vector]:
    """Return the vectors with every id following its task, rows of a removed one left out."""
    ids = np.array(list(vector_ids(before, after, removed)))
    found = []
    for vector in vectors:
        old = vector.inputs.get("task_ids")
        if old is None:
            continue
        if old.ndim != 1 or old.dtype.kind not in "iu":
            raise IntegrityError(
                f"{GOLDEN_FILE}: task_ids of {vector.name!r} are {old.dtype} {list(old.shape)}",
                expected="whole numbers [B]",
                fix="Run mtl-export parity --golden again",
            )
        known = (old >= 0) & (old < len(before))
        new = np.where(known, ids[np.where(known, old, 0)], np.where(old < 0, old, ids[-1]))
        # -1 stands for the removed task only among the known.
        rows = ~(known & (new == -1))
        if rows.any():
            inputs = {**_rows(vector.inputs, rows), "task_ids": new[rows].astype(old.dtype)}
            name = names.get(vector.name, vector.name)
            found.append(
                replace(vector, name=name, inputs=inputs, outputs=_rows(vector.outputs, rows))
            )
    return found


def _rows(arrays: Any, rows: Array) -> dict[str, Array]:
    """Return the chosen rows of every array that has them."""
    return {
        name: value[rows] if value.ndim and len(value) == len(rows) else value
        for name, value in arrays.items()
    }


def _widened(vectors: Sequence[Vector], models: dict[str, ir.Model]) -> list[Vector]:
    """Return the vectors with outputs as wide as the graphs' are now: -inf for absent labels."""
    found = []
    for vector in vectors:
        graph = models[Path(vector.model).stem].graph
        widths = {
            value.name: value.shape[-1]
            for value in graph.outputs
            if value.shape is not None and len(value.shape)
        }
        outputs = {}
        for name, saved in vector.outputs.items():
            width = widths.get(name)
            room = width - saved.shape[-1] if isinstance(width, int) and saved.ndim > 1 else 0
            # A row of NaN, the answer to an unknown id, is NaN in every column.
            fill = np.where(np.isnan(saved[..., -1:]), np.nan, -np.inf)
            wide = [saved, *[fill.astype(saved.dtype)] * max(0, room)]
            outputs[name] = np.concatenate(wide, axis=-1)
        found.append(replace(vector, outputs=outputs))
    return found
