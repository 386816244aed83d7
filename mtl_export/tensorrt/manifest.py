"""What was built, from what, and what was proven about it <-> ``<engine>.json``.

An engine cannot be opened without the GPU it is for, so its manifest says what it is.
The file is JSON, schema ``mtl-export.engine/1``, published as ``engine.schema.json`` in this
folder; within a version keys are only added. The same engine gives the same bytes: no times,
no paths, only names relative to the engine's or the graph's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.errors import IntegrityError, OutputError
from mtl_export.tensorrt.shapes import LIMITS, Profile
from mtl_export.tensorrt.source import TensorInfo

SCHEMA = "mtl-export.engine/1"
SCHEMA_FILE = Path(__file__).with_name("engine.schema.json")
PASSED = "passed"
NOT_RUN = "not-run"
# Of a graph from elsewhere, labels and kind may be anything.
TASKS: Shape = [{"name": str, "index": int}]
_TENSORS: Shape = [{"name": str, "dtype": str, "shape": [(int, str)]}]
_SHAPE: Shape = {
    "schema": {SCHEMA},
    "engine": {"file": str, "sha256": str, "size_bytes": int, "graph_sha256": str},
    "source": {"file": str, "sha256": {str: str}},
    "provenance": {str: str},
    "layout": str,
    "tasks": TASKS,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "profiles": [{str: {"min": [int], "opt": [int], "max": [int]}}],
    "precision": [str],
    "tf32": bool,
    "builder": {"name": str, "version": str, "options": {}},
    "libraries": {str: str},
    "targets": [str],
    "validated": [{"check": str, "verdict": str, "reason?": str}],
}


@dataclass(frozen=True)
class BuildCheck:
    """One thing that was looked at, or could not be.

    Attributes:
        check: What should hold.
        verdict: ``passed`` or ``not-run``; what fails is an error, and no manifest is written.
        reason: Why it was not run; "" if it passed.
    """

    check: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class EngineManifest:
    """An engine's manifest; the fields are those of the file, flattened.

    Attributes:
        engine: File name of the engine.
        engine_sha256: SHA-256 of the file.
        engine_size_bytes: Its size.
        graph_sha256: SHA-256 of its graph part, equal for engines that differ only in weights;
            "" where it cannot be told.
        source: File name of the ONNX graph.
        source_sha256: File name -> SHA-256, external data included.
        provenance: ``mtl_export.version``, ``family``, ``base_sha256``, ``checkpoint_sha256``
            of the graph.
        layout: ``per-task``, ``single-graph``, or "" for a graph from elsewhere.
        tasks: The graph's task table.
        inputs: What the engine takes: name, dtype, shape; a str is a dynamic dimension.
        outputs: What it gives.
        profiles: The shapes it accepts: input -> min, opt, max.
        precision: Element types that the network computes in, sorted.
        tf32: Whether float32 products may be rounded to TF32.
        builder: ``tensorrt`` or ``tensorrt_rtx``.
        builder_version: Its version.
        options: Builder options that were given.
        libraries: Versions of the Python packages that took part.
        targets: Compute capabilities that the engine is for.
        validated: What was checked, and what was not run and why.
    """

    engine: str
    engine_sha256: str
    engine_size_bytes: int
    graph_sha256: str
    source: str
    source_sha256: Mapping[str, str]
    provenance: Mapping[str, str]
    layout: str
    tasks: tuple[Mapping[str, Any], ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[Profile, ...]
    precision: tuple[str, ...]
    tf32: bool
    builder: str
    builder_version: str
    options: Mapping[str, Any]
    libraries: Mapping[str, str]
    targets: tuple[str, ...]
    validated: tuple[BuildCheck, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest as the file's JSON value."""
        return {
            "schema": SCHEMA,
            "engine": {
                "file": self.engine,
                "sha256": self.engine_sha256,
                "size_bytes": self.engine_size_bytes,
                "graph_sha256": self.graph_sha256,
            },
            "source": {"file": self.source, "sha256": dict(self.source_sha256)},
            "provenance": dict(self.provenance),
            "layout": self.layout,
            "tasks": [dict(task) for task in self.tasks],
            "inputs": _tensor_values(self.inputs),
            "outputs": _tensor_values(self.outputs),
            "profiles": [
                {
                    name: dict(zip(LIMITS, map(list, shapes), strict=True))
                    for name, shapes in profile.shapes.items()
                }
                for profile in self.profiles
            ],
            "precision": list(self.precision),
            "tf32": self.tf32,
            "builder": {
                "name": self.builder,
                "version": self.builder_version,
                "options": dict(self.options),
            },
            "libraries": dict(self.libraries),
            "targets": list(self.targets),
            "validated": [asdict(check) for check in self.validated],
        }

    def write(self, path: Path) -> None:
        """Write the manifest to ``path``, whole or not at all.

        Args:
            path: ``manifest_path(engine)``; it must end in ``.json``.

        Raises:
            OutputError: It cannot be written.
        """
        if path.suffix != ".json":
            raise ValueError(f"{path} is not a manifest path; use manifest_path(engine)")
        partial = partial_path(path)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise unwritable(path, error) from error

    def with_check(self, check: str) -> EngineManifest:
        """Return the manifest with one more check that passed, before those that need a run."""
        done, last = self.validated[:-2], self.validated[-2:]
        return replace(self, validated=(*done, BuildCheck(check, PASSED), *last))

    @classmethod
    def read(cls, path: Path) -> EngineManifest:
        """Return the manifest at ``path``.

        Raises:
            IntegrityError: It is missing, no manifest, or of another schema.
        """
        fix = "Build the engine again with mtl-export trt"
        value = read_json(path, _SHAPE, error=IntegrityError, fix=fix)
        return cls(
            engine=value["engine"]["file"],
            engine_sha256=value["engine"]["sha256"],
            engine_size_bytes=value["engine"]["size_bytes"],
            graph_sha256=value["engine"]["graph_sha256"],
            source=value["source"]["file"],
            source_sha256=value["source"]["sha256"],
            provenance=value["provenance"],
            layout=value["layout"],
            tasks=tuple(value["tasks"]),
            inputs=tuple(_tensor_info(tensor) for tensor in value["inputs"]),
            outputs=tuple(_tensor_info(tensor) for tensor in value["outputs"]),
            profiles=tuple(
                Profile(
                    {
                        name: (tuple(limits["min"]), tuple(limits["opt"]), tuple(limits["max"]))
                        for name, limits in profile.items()
                    }
                )
                for profile in value["profiles"]
            ),
            precision=tuple(value["precision"]),
            tf32=value["tf32"],
            builder=value["builder"]["name"],
            builder_version=value["builder"]["version"],
            options=value["builder"]["options"],
            libraries=value["libraries"],
            targets=tuple(value["targets"]),
            validated=tuple(
                BuildCheck(one["check"], one["verdict"], one.get("reason") or "")
                for one in value["validated"]
            ),
        )


def manifest_path(engine_path: Path) -> Path:
    """Return where the manifest of ``engine_path`` lies: ``<engine>.json`` beside it."""
    return engine_path.with_name(f"{engine_path.name}.json")


def partial_path(path: Path) -> Path:
    """Return where ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error for an engine or a manifest that cannot be written."""
    return OutputError(
        f"{path}: it cannot be written ({error.strerror or error})",
        expected="a writable folder with room for about the size of the weights",
        fix="Choose another --output, or make room",
    )


def _tensor_values(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in tensors]


def _tensor_info(value: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(value["name"], value["dtype"], tuple(value["shape"]))
