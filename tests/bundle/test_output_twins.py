"""Two runs that write one output at the same time."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import pytest

from mtl_export.bundle import output, staging
from mtl_export.bundle.manifest import Recipe, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.errors import OutputError
from tests.bundle.outputs import OTHER, RECIPE, tree, write


@pytest.mark.parametrize("is_there", [True, False])
def test_what_another_run_wrote_meanwhile_is_not_replaced(tmp_path: Path, is_there: bool) -> None:
    """With force too, which was meant for what lay there; the same result twice is none's loss."""
    target = tmp_path / "merged"
    if is_there:
        write(target, "old")
    begun = Recipe("onnx", {}, {}, "1.0")

    def beside(recipe: Recipe) -> None:
        with output_folder(target, recipe=begun, force=True) as plan:
            (plan.folder / "model").write_text("same")
            write(target, "same", recipe=recipe, force=True)

    with pytest.raises(OutputError, match="another run wrote it"):
        beside(OTHER)
    manifest = read_manifest(target)
    assert manifest is not None
    assert manifest.recipe == OTHER
    beside(begun)
    assert tree(tmp_path) == {"merged/model": "same"}


@pytest.mark.parametrize("at", ["at the end", "between the last look and the rename"])
def test_the_later_of_two_identical_runs_finds_it_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Nobody is blamed for the files of its twin, which stay what they are."""
    target = tmp_path / "merged"
    if at != "at the end":
        original = staging.put_in_place

        def overtaken(folder: Path, place: Path) -> None:
            monkeypatch.setattr(output, "put_in_place", original)
            write(target, "the twin's")
            os.rename(folder, place)

        monkeypatch.setattr(output, "put_in_place", overtaken)
    with output_folder(target, recipe=RECIPE) as plan:
        (plan.folder / "model").write_text("this one's")
        if at == "at the end":
            assert write(target, "the twin's")
    assert (plan.up_to_date, plan.folder) == (True, target)
    assert tree(tmp_path) == {"merged/model": "the twin's"}


def test_a_twin_that_swaps_at_this_moment_is_waited_for(tmp_path: Path) -> None:
    """It holds the folder for an instant, which is no reason to fail."""
    target = tmp_path / "merged"
    write(target, "old", recipe=OTHER)
    with ExitStack() as other, output_folder(target, recipe=RECIPE, force=True) as plan:
        (plan.folder / "model").write_text("new")
        other.enter_context(staging.locked(target, exclusive=True, wait=False))
        Timer(0.2, other.close).start()
    assert tree(tmp_path) == {"merged/model": "new"}
