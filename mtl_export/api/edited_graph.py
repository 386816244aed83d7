"""A single graph that ``mtl-export tasks`` changed: never written over, built from as it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.errors import EngineRunError, IntegrityError, OutputError, UsageError, shortened
from mtl_export.names import ENCODER_FILE, MODEL_FILE, PREFILL_FILE

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import FileEntry
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.graph.origins import EditedGraph


def edited_graph(folder: Path) -> EditedGraph | None:
    """Return what the single graph in ``folder`` says of its edits, None without any."""
    from mtl_export.graph.origins import EditedGraph

    metadata = _metadata(folder)
    return EditedGraph.from_metadata(metadata) if metadata else None


def refuse_edited(folder: Path, bound: BoundModel) -> None:
    """Refuse to export over a graph whose tasks were edited, with --force too.

    Raises:
        OutputError: There is one.
    """
    edited = edited_graph(folder)
    if edited is None:
        return
    others = edited.others(bound.adapters.checkpoint_sha256)
    raise OutputError(
        f"{folder}: its single graph was {edited.text}",
        expected="a graph as it was exported, or none, because an export would undo that"
        + (f", and drop {shortened(others)}, of another checkpoint" if others else ""),
        fix=f"Pass another folder to --output, or move {folder} away first",
    )


def refuse_to_quantise(folder: Path) -> None:
    """Refuse a single graph whose tasks were edited.

    Raises:
        UsageError: It is one.
    """
    edited = edited_graph(folder)
    if edited is not None:
        raise UsageError(
            f"{folder}: its single graph was {edited.text}",
            expected=(
                "a single graph as it was exported, because what quantising costs is counted on "
                "the tasks of one checkpoint"
            ),
            fix=(
                "Pass --layout per-task, or export a checkpoint that has all its tasks to another "
                "folder"
            ),
        )


def tasks_to_build(
    folder: Path, bound: BoundModel, asked: dict[str, tuple[str, str]]
) -> tuple[Task, ...] | None:
    """Return the tasks of the edited graph in ``folder``, None where it is not edited.

    Args:
        folder: Of the single graph.
        bound: The checkpoint and base that a graph without edits would be made from.
        asked: What a graph is to be, by its key in the metadata: the option that says so, and
            its value; nothing of what was left to the default.

    Raises:
        UsageError: The graph is not what was asked for, or has no task of the checkpoint.
    """
    from mtl_export.parity.artefact import no_task_of

    edited, metadata = edited_graph(folder), _metadata(folder)
    if edited is None:
        return None
    problem = no_task_of(edited, bound.adapters)
    if metadata.get("mtl_export.base_sha256") != bound.base.sha256:
        problem = f"made from another base than {bound.base.reference}; {edited.text}"
    wrong = [option for key, (option, value) in asked.items() if metadata.get(key, "") != value]
    if problem or wrong:
        raise UsageError(
            f"{folder}: "
            f"{problem or f'its single graph was {edited.text}, and is of another {wrong[0]}'}",
            expected=(
                "an edited graph of this checkpoint, in the form asked for, because a graph with "
                "edits is built from as it lies, not exported again"
            ),
            fix=f"Leave {wrong[0]} out, or move {folder} away first"
            if wrong and not problem
            else f"Pass its checkpoint and base, or move {folder} away first",
        )
    return edited.tasks


def whole_files(folder: Path) -> dict[str, FileEntry]:
    """Return the files of an edited graph's folder, by name.

    Raises:
        IntegrityError: They are not as they were written.
    """
    from mtl_export.bundle.manifest import damage, read_manifest

    manifest = read_manifest(folder)
    problems = damage(folder, manifest) if manifest else ["no manifest"]
    if manifest is None or problems:
        raise IntegrityError(
            f"{folder}: {shortened(problems)}",
            expected=(
                "the files that mtl-export tasks wrote there, because it is built from as it lies"
            ),
            fix="Restore them, or move the folder away and export again",
        )
    return dict(manifest.files)


def _metadata(folder: Path) -> dict[str, str]:
    """Return what the first graph in ``folder`` says; empty where there is none to read."""
    from mtl_export.runtime.ort import onnx_metadata

    paths = (folder / name for name in (MODEL_FILE, PREFILL_FILE, ENCODER_FILE))
    path = next((path for path in paths if path.is_file()), None)
    try:
        return onnx_metadata(path) if path else {}
    except EngineRunError:
        return {}  # who reads the whole graph says what is wrong
