"""Results that cost time, kept as JSON and used again only for exactly the same question.

    {"schema": "mtl-export.calibration/3", "key": {...}, "value": {...}}

The key holds every input of the result: hashes of data and graph, method, options and
versions. A file whose key differs in anything, or that cannot be read, counts as absent.
Values keep their order, so that ties are broken as when they were measured.

The folder is an output of its own, with a manifest while nobody works in it: ``verify``
checks it as any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.bundle.kinds import CACHE
from mtl_export.bundle.manifest import MANIFEST_FILE, Recipe, own_files, write_manifest
from mtl_export.bundle.staging import locked
from mtl_export.checkpoint.files.json_file import OBJECT, Shape, json_or_none
from mtl_export.checkpoint.files.npz_file import read_npz
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import MtlExportError
from mtl_export.version import VERSION
from mtl_export_calibration.half import HALF

SCHEMA = "mtl-export.calibration/3"
# What arrays of a file belong to; no activation has this name.
_KEY = "mtl_export.key"


@contextmanager
def open_cache(folder: Path) -> Iterator[Path]:
    """Give ``folder`` to one run at a time, and list what is in it at the end.

    A run that comes meanwhile waits, and finds what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, exclusive=True, wait=True):
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for rest in (*folder.glob("*.partial"), *folder.glob(f"{HALF}-*")):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        try:
            yield folder
        finally:
            # A disk that is full was told of already, and what is not listed fails verify.
            with suppress(OSError):
                if any(own_files(folder)):
                    write_manifest(folder, Recipe(CACHE, {}, {}, VERSION))
                else:
                    folder.rmdir()


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions that decide numbers, with those of further ``packages``."""
    import numpy
    import onnxruntime

    return {
        "mtl_export": VERSION,
        "numpy": numpy.__version__,
        "onnx_ir": version("onnx-ir"),
        "onnxruntime": onnxruntime.__version__,
        **{name: version(name) for name in packages},
    }


def read_cache(path: Path, key: Mapping[str, Any], shape: Shape = OBJECT) -> dict[str, Any] | None:
    """Return what was kept in ``path`` for ``key``, None if nothing of ``shape`` was."""
    document = json_or_none(path, {"schema": {SCHEMA}, "key": {}, "value": shape})
    if document is None or _line(document["key"]) != _line(key):
        return None
    value: dict[str, Any] = document["value"]
    return value


def write_cache(path: Path, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Keep ``value`` for ``key`` in ``path``; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "key": key, "value": value}
    partial = path.with_name(f"{path.name}.partial")
    text = json.dumps(document, indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_arrays(path: Path, key: Mapping[str, Any]) -> dict[str, Array] | None:
    """Return the arrays that were kept in ``path`` for ``key``, None if none were."""
    try:
        line, found = read_npz(path, _KEY, fix="Delete it")
    except MtlExportError:
        return None
    return found if line == _line(key) else None


def write_arrays(path: Path, key: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Keep ``arrays`` for ``key`` in ``path``; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{**arrays, _KEY: np.array(_line(key))})
    partial.replace(path)


def _line(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
