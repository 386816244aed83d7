"""Outputs of one file, and what lies in a folder."""

from __future__ import annotations

from pathlib import Path

from mtl_export.bundle.manifest import MANIFEST_FILE, Recipe
from mtl_export.bundle.output import output_folder

ROOT = Path(__file__).parents[2]
RECIPE = Recipe("merge", {"dtype": "fp32"}, {"base_sha256": "ab"}, "1.0")
OTHER = Recipe("merge", {"dtype": "fp16"}, {"base_sha256": "ab"}, "1.0")


def write(
    target: Path, content: str, *, recipe: Recipe = RECIPE, name: str = "model", force: bool = False
) -> bool:
    """Write one file; return whether anything had to be done."""
    with output_folder(target, recipe=recipe, force=force) as plan:
        if not plan.up_to_date:
            (plan.folder / name).write_text(content)
        return not plan.up_to_date


def tree(folder: Path) -> dict[str, str]:
    """Return every file below ``folder``, hidden ones too, without manifests."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
