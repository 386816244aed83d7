"""A finished folder -> is it still what was written, and does it still answer as it did?

    files     every file that its manifest lists has its SHA-256, and there is no other
    golden    its models, run on the saved inputs, give the saved outputs

Outputs nested in the folder (``onnx/<task>/``) are checked by their own manifests, and a
folder that only holds outputs (``out/``) by theirs. Files need nothing to be checked and
graphs numpy and onnxruntime, no torch. An engine needs its GPU, and torch for the memory
there; it is ``not-run`` elsewhere, as a merged folder is, which only PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_export.bundle.manifest import MANIFEST_FILE, Manifest, damage, own_files, read_manifest
from mtl_export.errors import (
    BackendMissingError,
    IntegrityError,
    MtlExportError,
    UsageError,
    shortened,
)
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, read_golden
from mtl_export.runtime.model_files import runner_of

FILES: Literal["files"] = "files"
GOLDEN: Literal["golden"] = "golden"
NO_VECTORS = "no golden vectors; mtl-export parity --golden saves them"
NO_TORCH = "only PyTorch runs this folder; mtl-export parity compares it"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        folder: The output, from where ``verify_folder`` was pointed; "." for itself.
        kind: ``files`` or ``golden``.
        what: Which file or vector; what the files are for ``files``.
        verdict: What could not run is ``not-run``, never ``passed``.
        reason: Why it failed or did not run; empty when passed.
    """

    folder: str
    kind: Literal["files", "golden"]
    what: str
    verdict: Literal["passed", "failed", "not-run"]
    reason: str = ""


def verify_folder(
    root: Path, *, threads: int = 0, progress: Callable[[str], None] = lambda step: None
) -> list[Check]:
    """Return what was checked of ``root`` and of the outputs inside it.

    Args:
        root: A folder that mtl-export wrote, or one that holds such folders.
        threads: Threads of the runtime; 0 lets it decide.
        progress: Called with the name of each output as it begins.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: No manifest is there to check against.
    """
    if not root.is_dir():
        raise UsageError(
            where=str(root),
            found="no such folder",
            expected="a folder that mtl-export wrote",
            fix="Pass the folder that merge, onnx or trt wrote",
        )
    outputs = list(output_folders(root))
    if not outputs:
        raise IntegrityError(
            where=str(root),
            found=f"no {MANIFEST_FILE} in it or below",
            expected="the manifest of what mtl-export wrote",
            why="what cannot be checked must not pass",
            fix="Export it again",
        )
    checks = []
    if root not in outputs:
        strangers = [path for path in own_files(root) if path.is_symlink() or path.is_file()]
        checks += [_stranger(path.relative_to(root).as_posix()) for path in strangers]
    for folder in outputs:
        name = folder.relative_to(root).as_posix()
        progress(name)
        checks += _verify_output(folder, name, threads)
    return checks


def output_folders(root: Path) -> Iterator[Path]:
    """Yield ``root`` and the folders below it that have a manifest, in name order."""
    if (root / MANIFEST_FILE).is_file():
        yield root
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from output_folders(child)


def _verify_output(folder: Path, name: str, threads: int) -> list[Check]:
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        return [Check(name, FILES, MANIFEST_FILE, "failed", str(error))]
    assert manifest is not None
    problems = damage(folder, manifest) + _extra(folder, manifest)
    what = f"{len(manifest.files)} files"
    if problems:
        reason = shortened(problems, limit=20)
        return [
            Check(name, FILES, what, "failed", reason),
            Check(name, GOLDEN, GOLDEN_FILE, "not-run", "its files are not what was written"),
        ]
    return [Check(name, FILES, what, "passed"), *_replay(folder, name, manifest, threads)]


def _extra(folder: Path, manifest: Manifest) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in own_files(folder))
    return [f"{name} is not in the manifest" for name in found if name not in manifest.files]


def _stranger(name: str) -> Check:
    return Check(".", FILES, name, "failed", f"{name} belongs to no manifest")


def _replay(folder: Path, name: str, manifest: Manifest, threads: int) -> list[Check]:
    if GOLDEN_FILE not in manifest.files:
        models = [file for file in manifest.files if Path(file).suffix in {".onnx", ".engine"}]
        reason = NO_VECTORS if models else NO_TORCH
        return [Check(name, GOLDEN, GOLDEN_FILE, "not-run", reason)]
    try:
        vectors = read_golden(folder / GOLDEN_FILE)
    except IntegrityError as error:
        return [Check(name, GOLDEN, GOLDEN_FILE, "failed", str(error))]
    checks = []
    for model in dict.fromkeys(one.model for one in vectors):
        own = [one for one in vectors if one.model == model]
        checks += _replay_model(folder / model, name, own, threads)
    return checks


def _replay_model(path: Path, name: str, vectors: list[Vector], threads: int) -> list[Check]:
    checks: list[Check] = []
    try:
        with runner_of(path, threads=threads) as runner:
            for vector in vectors:
                reason = vector.difference(runner.infer(vector.inputs))
                what = f"{path.name}, {vector.name}"
                checks.append(Check(name, GOLDEN, what, "failed" if reason else "passed", reason))
    except BackendMissingError as error:
        checks.append(Check(name, GOLDEN, path.name, "not-run", str(error)))
    except MtlExportError as error:
        checks.append(Check(name, GOLDEN, path.name, "failed", str(error)))
    return checks
