"""A manifest -> what it lacks of what its command writes.

    merge        config.json, merge-report.json, *.safetensors (its own, or shared ones beside)
    onnx         config.json, *.onnx, *.data
    calibrate    config.json, calibration.json, *.onnx, *.data
    trt          *.engine, and X.engine.json for each X.engine
    inspect      *.safetensors: a checkpoint that was converted, its base perhaps unknown

A language model is several graphs or engines, and none of them may be missing. Sources are
SHA-256s, those of the base and of the checkpoint among them. Two kinds of folders are
less: shared weights of merged tasks, and the cache of ``calibrate``.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from mtl_export.bundle.manifest import MANIFEST_FILE, Manifest
from mtl_export.bundle.shared import SHARED_FOLDER

CACHE = "calibrate cache"
_WRITTEN = {
    "merge": ("config.json", "merge-report.json", "*.safetensors"),
    "onnx": ("config.json", "*.onnx", "*.data"),
    "calibrate": ("config.json", "calibration.json", "*.onnx", "*.data"),
    "trt": ("*.engine", "*.engine.json"),
    "inspect": ("*.safetensors",),
    CACHE: (),
}
_PARTS = ({"prefill", "decode"}, {"encoder", "decoder", "decoder_with_past"})
_BOTH = ("base_sha256", "checkpoint_sha256")
_SOURCES = {CACHE: (), "inspect": _BOTH[1:]}
_SHA256 = re.compile("[0-9a-f]{64}")


def unlike_its_kind(manifest: Manifest) -> list[str]:
    """Return what a manifest says that its command does not write, one phrase each."""
    recipe = manifest.recipe
    if recipe.command not in _WRITTEN:
        return [f"{MANIFEST_FILE} has the command {recipe.command!r}, which writes no folder"]
    wanted = _WRITTEN[recipe.command]
    if recipe.options.get("task") == SHARED_FOLDER:
        wanted = wanted[-1:]
    listed = [PurePosixPath(name).name for name in (*manifest.files, *manifest.beside)]
    problems = [
        f"{MANIFEST_FILE} lists no {pattern}, which {recipe.command} writes"
        for pattern in (*wanted, *_partners(listed))
        if not any(fnmatchcase(name, pattern) for name in listed)
    ]
    named = {**dict.fromkeys(_SOURCES.get(recipe.command, _BOTH), ""), **recipe.sources}
    return problems + [
        f"{MANIFEST_FILE} has no SHA-256 under sources, {name}"
        for name, digest in sorted(named.items())
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest)
    ]


def _partners(listed: list[str]) -> list[str]:
    """Return the files that the listed ones cannot do without."""
    found = [f"{name}.json" for name in listed if name.endswith(".engine")]
    for suffix in (".onnx", ".engine"):
        stems = {name.removesuffix(suffix) for name in listed if name.endswith(suffix)}
        found += [f"{one}{suffix}" for parts in _PARTS if stems & parts for one in sorted(parts)]
    return found
