"""Requests to merge all tasks of a toy, and what became of their folders."""

from __future__ import annotations

from pathlib import Path

from mtl_export.adapters.binding import BoundModel
from mtl_export.bundle.manifest import OptionValue, Recipe, damage, read_manifest
from mtl_export.bundle.merged import MergedTask, MergeRequest
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.merge.writer import MergeOptions

TASKS = ("task0", "task1", "task2")
REFERENCED = MergeOptions(layout="shared", is_linked=False)


def request_for(
    bound: BoundModel,
    parent: Path,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
) -> MergeRequest:
    """Return the request for all tasks."""
    options = options or MergeOptions()

    def recipe(name: str) -> Recipe:
        own: dict[str, OptionValue] = {"task": name, "dtype": options.dtype}
        sources = {
            "base_sha256": bound.base.sha256,
            "checkpoint_sha256": bound.adapters.checkpoint_sha256,
        }
        return Recipe("merge", own, sources, "1")

    tasks = bound.adapters.tasks
    return MergeRequest(bound, tasks, parent, options, recipe, force, resume, verify)


def assert_whole(folder: Path) -> None:
    """Check that every file is what the folder's manifest says."""
    manifest = read_manifest(folder)
    assert manifest is not None
    assert damage(folder, manifest) == []
    listed = {*manifest.files, "mtl-export.json"}
    assert listed == {path.name for path in folder.iterdir()}


def statuses(results: list[MergedTask]) -> list[bool]:
    """Return which tasks were up to date."""
    return [result.plan.up_to_date for result in results]


def tensors_of(bound: BoundModel) -> list[Tensor]:
    """Return the tensors of the base."""
    return list(bound.base.tensors.values())
