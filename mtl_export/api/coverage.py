"""Is everything that ships compared? Folders that no task claims, and what ``--require-run`` asks.

A check must not shrink because a folder was renamed or is gone: what mtl-export wrote there and
nobody compares is said by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.errors import BackendMissingError, shortened
from mtl_export.names import PER_TASK, QUANTISED_DTYPES

if TYPE_CHECKING:
    from mtl_export.api.artefacts import Places
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.report import Cell, ParityReport

# Of what is not a folder of weights.
_SUFFIXES = frozenset({".onnx", ".engine"})


def unclaimed_cells(places: Places, tasks: Sequence[Task]) -> list[Cell]:
    """Return a failed cell for each folder with a manifest of ours that no task claims.

    One of a checkpoint that the single graph got tasks of, or had them of before, is not-run:
    that checkpoint claims it.

    Args:
        places: Where artefacts lie.
        tasks: The checkpoint's.
    """
    from mtl_export.bundle.manifest import MANIFEST_FILE
    from mtl_export.names import ADAPTER_INPUT
    from mtl_export.parity.report import Cell

    known = {ADAPTER_INPUT, *(task.name for task in tasks)}
    roots = list(_roots(places))
    own = {folder.absolute() for _, _, folder in roots}
    others = _checkpoints_of_graph(places.onnx)
    cells = []
    for name, _, folder in roots:
        for child in sorted(folder.iterdir()) if folder.is_dir() else ():
            is_ours = (child / MANIFEST_FILE).is_file() and not child.is_symlink()
            # A hidden one is what a killed run left, which the next removes.
            is_known = child.name in known or child.absolute() in own
            if not is_ours or is_known or child.name.startswith("."):
                continue
            if (source := _checkpoint_of(child)) in others:
                reason = (
                    f"{child} is of another checkpoint ({source[:12]}...), as are tasks of the"
                    " single graph: mtl-export parity --checkpoint with that one judges it"
                )
                cells.append(Cell(name, "-", child.name, "*", "not-run", reason))
            else:
                reason = (
                    f"{child} holds an export, but no task is called {child.name!r}: give it back"
                    " its task's name, or delete or move it"
                )
                cells.append(Cell(name, "-", child.name, "*", "failed", reason))
    return cells


def _checkpoints_of_graph(folder: Path) -> frozenset[str]:
    """Return the checkpoints that an edited single graph's tasks came from; empty without one."""
    from mtl_export.api.edited_graph import edited_graph

    edited = edited_graph(folder)
    return frozenset(one.checkpoint_sha256 for one in edited.origins) if edited else frozenset()


def _checkpoint_of(folder: Path) -> str:
    """Return what the manifest of a folder says it was made from; "" if it cannot be read."""
    from mtl_export.bundle.manifest import read_manifest
    from mtl_export.errors import IntegrityError

    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        return ""
    return manifest.recipe.sources.get("checkpoint_sha256", "") if manifest else ""


def refuse_not_run(report: ParityReport, lacking: Sequence[str]) -> BackendMissingError | None:
    """Return what ``--require-run`` finds missing; None if nothing.

    Args:
        report: What was compared.
        lacking: Tasks without an export, from ``lacking_exports``.
    """
    from mtl_export.api.artefacts import is_absent
    from mtl_export.parity.checks.quantised import PLAIN

    found = [
        f"{cell.artefact}{'' if cell.task == '*' else f' of {cell.task}'}: {cell.reason}"
        for cell in report.cells
        if cell.verdict == "not-run" and cell.case in {"*", PLAIN} and not is_absent(cell)
    ]
    if not (found or lacking):
        return None
    return BackendMissingError(
        f"--require-run: {shortened([*found, *lacking]).rstrip('.')}",
        expected=(
            "every export there, and a runtime and a device for it, because what is not run is "
            "not proven"
        ),
        fix="Run it where that is there, or export what is missing",
    )


def lacking_exports(
    artefacts: Sequence[Artefact],
    places: Places,
    tasks: Sequence[Task],
    named: Collection[Path | None],
) -> list[str]:
    """Return for which tasks a folder has no export: no own one, and none that serves all.

    Args:
        artefacts: What was found.
        places: Where.
        tasks: The checkpoint's.
        named: Folders that the user named, which must hold something; others may be empty.
    """
    lacking = []
    for _, suffix, folder in _roots(places):
        own = [
            one
            for one in artefacts
            if one.path is not None
            and one.path.is_relative_to(folder)
            and (one.path.suffix if one.path.suffix in _SUFFIXES else "") == suffix
        ]
        served = {task.name for one in own for task in ([one.task] if one.task else tasks)}
        if own or folder in named:
            lacking += [
                f"{folder} has nothing for task {task.name}"
                for task in tasks
                if task.name not in served
            ]
    return lacking


def _roots(places: Places) -> Iterator[tuple[str, str, Path]]:
    """Yield what a folder holds for one task, its files' suffix, and the folder."""
    from mtl_export.names import MERGED_MODEL, PER_TASK_ENGINE, PER_TASK_ONNX

    yield MERGED_MODEL, "", places.merged
    yield PER_TASK_ONNX, ".onnx", places.onnx
    yield PER_TASK_ENGINE, ".engine", places.engines
    if places.quantised is not None:
        for number in QUANTISED_DTYPES:
            yield f"{PER_TASK} {number}", ".onnx", places.quantised / f"onnx-{number}"
            yield (
                f"{PER_TASK_ENGINE} {number}", ".engine", places.quantised / f"engines-{number}"
            )  # fmt: skip
