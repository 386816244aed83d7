"""A finished folder -> is it still what was written, and does it still answer as it did?

    files     its manifest is as it was written, and lists what its command writes; every file
              that it lists has its SHA-256, there is no other; graphs and engines name the
              sources that it names; with ``expected``, it is one of those that were asked for
    golden    its models, run on the saved inputs, give the saved outputs
    remark    what is nobody's damage: what a run is writing at this moment, tasks that have
              no folder where others have

What a killed run left is named and fails, for nothing says what it holds: the next run that
writes in its place removes it. A manifest tells what changed since it was written, not who
wrote it: whoever can write the folder can write another one, which only ``expected`` tells.

Outputs nested in the folder (``onnx/<task>/``) are checked by their own manifests, and a
folder that only holds outputs (``out/``) by theirs. Tasks are written one by one, in any
order and only those wanted, so nothing records which folders there were: one that was
deleted with its manifest is a remark, and fails only who asks for all tasks. Files need
nothing to be checked and graphs numpy and onnxruntime, no torch; where onnx is installed,
graphs are asked for their sources. An engine needs its GPU, and torch for the memory there;
it is ``not-run`` elsewhere, as a merged folder is, which only PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_export.bundle.kinds import unlike_its_kind
from mtl_export.bundle.manifest import MANIFEST_FILE, Manifest, damage, own_files, read_manifest
from mtl_export.bundle.staging import is_locked, is_staging
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import (
    BackendMissingError,
    IntegrityError,
    MtlExportError,
    UsageError,
    shortened,
)
from mtl_export.names import SINGLE_GRAPH
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, read_golden
from mtl_export.runtime.model_files import ENGINE_SUFFIX, runner_of
from mtl_export.runtime.ort import onnx_metadata

FILES: Literal["files"] = "files"
GOLDEN: Literal["golden"] = "golden"
REMARK: Literal["remark"] = "remark"
NO_VECTORS = "no golden vectors; mtl-export parity --golden saves them"
# Without its manifest while mtl_export_calibration works there, which holds it locked.
CACHE_FOLDER = "calibration"
_SOURCES = ("base_sha256", "checkpoint_sha256")
NO_TORCH = "only PyTorch runs this folder; mtl-export parity compares it"


@dataclass(frozen=True, slots=True)
class VerifiedItem:
    """One thing that was looked at.

    Attributes:
        folder: The output, from where ``verify_folder`` was pointed; "." for itself.
        kind: ``files``, ``golden`` or ``remark``.
        what: Which file, vector or folder; how many the files are for ``files``.
        verdict: What could not run is ``not-run``, never ``passed``.
        reason: Why it failed or did not run; empty when passed.
        within: Largest error that a golden vector allows; None of what was not run.
        manifest_sha256: Of the manifest that files were held against; else empty.
    """

    folder: str
    kind: Literal["files", "golden", "remark"]
    what: str
    verdict: Literal["passed", "failed", "not-run"]
    reason: str = ""
    within: float | None = None
    manifest_sha256: str = ""


def verify_folder(
    root: Path,
    *,
    threads: int = 0,
    all_tasks: bool = False,
    expected: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> list[VerifiedItem]:
    """Return what was checked of ``root`` and of the outputs inside it.

    Args:
        root: A folder that mtl-export wrote, or one that holds such folders.
        threads: Threads of the runtime; 0 lets it decide.
        all_tasks: A task that has no folder where others have is a failure, not a remark.
        expected: SHA-256 of the manifests that are to be found, and no other; empty: any.
        progress: Called with the name of each output as it begins.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: No manifest is there to check against.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder",
            expected="a folder that mtl-export wrote",
            fix="Pass the folder that merge, onnx or trt wrote",
        )
    outputs = list(output_folders(root))
    if not outputs:
        raise IntegrityError(
            f"{root}: no {MANIFEST_FILE} in it or below",
            expected=(
                "the manifest of what mtl-export wrote, because what cannot be checked must not "
                "pass"
            ),
            fix="Export it again",
        )
    checks = []
    if root not in outputs:
        strangers = [path for path in _own_files(root) if path.is_symlink() or path.is_file()]
        checks += [_stranger(path.relative_to(root).as_posix()) for path in strangers]
    hash_of = _hash_once()
    manifests: dict[Path, Manifest] = {}
    for folder in outputs:
        name = folder.relative_to(root).as_posix()
        progress(name)
        try:
            manifest = read_manifest(folder)
        except IntegrityError as error:
            checks.append(VerifiedItem(name, FILES, MANIFEST_FILE, "failed", str(error)))
            continue
        assert manifest is not None
        manifests[folder] = manifest
        checks += _verify_output(folder, name, manifest, threads, hash_of)
    if expected:
        checks += _unexpected(checks, expected)
    return [*checks, *_absent_tasks(root, manifests, all_tasks=all_tasks), *_rests(root)]


def _unexpected(checks: Sequence[VerifiedItem], expected: Sequence[str]) -> Iterator[VerifiedItem]:
    """Yield every manifest that is not expected, and every one that is and was not found."""
    found = {one.manifest_sha256: one.folder for one in checks if one.manifest_sha256}
    for digest, folder in found.items():
        if digest not in expected:
            reason = f"its SHA-256 is {digest}, which is none of those expected"
            yield VerifiedItem(folder, FILES, MANIFEST_FILE, "failed", reason)
    for digest in dict.fromkeys(expected):
        if digest not in found:
            yield VerifiedItem(
                ".", FILES, MANIFEST_FILE, "failed", f"none has the SHA-256 {digest}"
            )


def output_folders(root: Path) -> Iterator[Path]:
    """Yield ``root`` and the folders below it that have a manifest, in name order."""
    if (root / MANIFEST_FILE).is_file():
        yield root
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.is_symlink() and not is_staging(child.name):
            yield from output_folders(child)


def _verify_output(
    folder: Path, name: str, manifest: Manifest, threads: int, hash_of: Callable[[Path], str]
) -> list[VerifiedItem]:
    problems = damage(folder, manifest, hash_of) + _extra(folder, manifest)
    problems += unlike_its_kind(manifest)
    problems = problems or _other_sources(folder, manifest)
    what, digest = f"{len(manifest.files)} files", sha256_of_file(folder / MANIFEST_FILE)
    if problems:
        reason = shortened(problems, limit=20)
        return [
            VerifiedItem(name, FILES, what, "failed", reason, manifest_sha256=digest),
            VerifiedItem(
                name, GOLDEN, GOLDEN_FILE, "not-run", "its files are not what was written"
            ),
        ]
    passed = VerifiedItem(name, FILES, what, "passed", manifest_sha256=digest)
    return [passed, *_replay(folder, name, manifest, threads)]


def _hash_once() -> Callable[[Path], str]:
    """Return a function that hashes a file once, however many folders link or refer to it."""
    known: dict[tuple[int, int], str] = {}

    def hash_of(path: Path) -> str:
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in known:
            known[key] = sha256_of_file(path)
        return known[key]

    return hash_of


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of ``folder`` that no other check names: not those in ``_rests``."""
    for path in own_files(folder):
        inner = (one for one in path.parents if one != folder and one.is_relative_to(folder))
        if not any(is_staging(one.name) or _is_cache_at_work(one) for one in inner):
            yield path


def _is_cache_at_work(folder: Path) -> bool:
    return folder.name == CACHE_FOLDER and is_locked(folder)


def _rests(root: Path) -> Iterator[VerifiedItem]:
    """Yield what runs are writing now, a remark, and what killed ones left, a failure."""
    for path in _folders(root):
        name = path.relative_to(root).as_posix()
        if not is_staging(path.name) and not _is_cache_at_work(path):
            continue
        if is_locked(path):
            yield VerifiedItem(".", REMARK, name, "not-run", "a run is writing it now")
        else:
            reason = "the rest of a killed run: run its command again, or delete it"
            yield VerifiedItem(".", FILES, name, "failed", reason)


def _folders(root: Path) -> Iterator[Path]:
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield child
            if not is_staging(child.name):
                yield from _folders(child)


def _absent_tasks(
    root: Path, manifests: Mapping[Path, Manifest], *, all_tasks: bool
) -> Iterator[VerifiedItem]:
    """Yield what is to be said of tasks that have no folder beside those of others."""
    known: dict[Path, list[str]] = {}
    for folder, manifest in manifests.items():
        options = manifest.recipe.options
        tasks = options.get("tasks")
        # Merged folders have no layout but "shared", calibrated ones none.
        is_single = options.get("layout") == SINGLE_GRAPH
        is_own = folder.name == options.get("task") or [folder.name] == options.get("served")
        if folder != root and is_own and not is_single and isinstance(tasks, list):
            known.setdefault(folder.parent, []).extend(tasks)
    for parent, tasks in known.items():
        absent = [task for task in dict.fromkeys(tasks) if parent / task not in manifests]
        if absent:
            name = parent.relative_to(root).as_posix()
            what = f"{len(absent)} of {len({*tasks})} tasks have no folder"
            if all_tasks:
                yield VerifiedItem(name, FILES, what, "failed", shortened(absent))
            else:
                yield VerifiedItem(name, REMARK, what, "not-run", shortened(absent))


def _other_sources(folder: Path, manifest: Manifest) -> list[str]:
    """Return where graphs or engines name another base or checkpoint than the manifest."""
    problems = []
    for file in manifest.files:
        named = _named_sources(folder / file)
        for source in _SOURCES:
            mine, others = manifest.recipe.sources.get(source), named.get(source)
            if mine and others and mine != others:
                problems.append(f"{MANIFEST_FILE} has {source} {mine}, {file} has {others}")
    return problems


def _named_sources(path: Path) -> dict[str, str]:
    """Return the sources that a graph or engine names; empty where that cannot be told."""
    with suppress(ImportError, MtlExportError):
        if path.suffix == ".onnx":
            found = onnx_metadata(path)
            return {name: found.get(f"mtl_export.{name}", "") for name in _SOURCES}
        if path.suffix == ENGINE_SUFFIX:
            # Not above: graphs are checked where nothing that engines need is installed.
            from mtl_export.tensorrt.manifest import EngineManifest, manifest_path

            provenance = EngineManifest.read(manifest_path(path)).provenance
            return {name: str(provenance.get(name, "")) for name in _SOURCES}
    return {}


def _extra(folder: Path, manifest: Manifest) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in _own_files(folder))
    return [f"{name} is not in the manifest" for name in found if name not in manifest.files]


def _stranger(name: str) -> VerifiedItem:
    return VerifiedItem(".", FILES, name, "failed", f"{name} belongs to no manifest")


def _replay(folder: Path, name: str, manifest: Manifest, threads: int) -> list[VerifiedItem]:
    if GOLDEN_FILE not in manifest.files:
        models = [file for file in manifest.files if Path(file).suffix in {".onnx", ".engine"}]
        reason = NO_VECTORS if models else NO_TORCH
        return [VerifiedItem(name, GOLDEN, GOLDEN_FILE, "not-run", reason)]
    try:
        vectors = read_golden(folder / GOLDEN_FILE)
    except IntegrityError as error:
        return [VerifiedItem(name, GOLDEN, GOLDEN_FILE, "failed", str(error))]
    checks = []
    for model in dict.fromkeys(one.model for one in vectors):
        own = [one for one in vectors if one.model == model]
        checks += _replay_model(folder / model, name, own, threads)
    return checks


def _replay_model(path: Path, name: str, vectors: list[Vector], threads: int) -> list[VerifiedItem]:
    checks: list[VerifiedItem] = []
    try:
        with runner_of(path, threads=threads) as runner:
            for vector in vectors:
                reason = vector.vacuity or vector.difference(runner.infer(vector.inputs))
                what = f"{path.name}, {vector.name}"
                verdict: Literal["passed", "failed"] = "failed" if reason else "passed"
                checks.append(VerifiedItem(name, GOLDEN, what, verdict, reason, vector.widest))
    except BackendMissingError as error:
        checks.append(VerifiedItem(name, GOLDEN, path.name, "not-run", str(error)))
    except MtlExportError as error:
        checks.append(VerifiedItem(name, GOLDEN, path.name, "failed", str(error)))
    return checks
