"""An engine, its source and the checks it passed <-> ``<engine>.json``.

An engine cannot be opened without the GPU it is for, so its manifest says what it is.
The file is JSON, schema ``mtl-export.engine/1``, published as ``engine.schema.json`` in this
folder; within a version keys are only added. The same engine gives the same bytes: no times,
no paths, only names relative to the engine's or the graph's folder.

What can be wrong with a finished engine and seen from outside is checked here: its length, the
library version and the targets in its header. What cannot be seen (that a GPU opens it, that
its numbers are right) is listed as not run, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.errors import EngineBuildError, IntegrityError, OutputError
from mtl_export.tensorrt.available import BuilderInfo
from mtl_export.tensorrt.header import EngineHeader, read_header, sha256_of_graph
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.shapes import LIMITS, Profile
from mtl_export.tensorrt.source import PREFIX, OnnxSource, TensorInfo
from mtl_export.version import VERSION

SCHEMA = "mtl-export.engine/1"
SCHEMA_FILE = Path(__file__).with_name("engine.schema.json")
# The graphs of models that generate, which hand on keys and values.
PARTS = ("prefill", "decode", "encoder", "decoder", "decoder_with_past")
PROVENANCE = ("version", "family", "base_sha256", "checkpoint_sha256")
_PACKAGE_ENDINGS = ("", "_cu12", "_cu13")
_PACKAGE_PARTS = ("", "_bindings", "_libs")
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
            "" where it is not known.
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
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text.encode())

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
    """Return the path of the manifest: ``<engine>.json``, next to ``engine_path``."""
    return engine_path.with_name(f"{engine_path.name}.json")


def partial_path(path: Path) -> Path:
    """Return where ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes, option: str = "--output") -> None:
    """Write a file whole or not at all, while others may write it too.

    Raises:
        OutputError: It cannot be written where ``option`` says.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise unwritable(path, error, option) from error


def unwritable(path: Path, error: OSError, option: str = "--output") -> OutputError:
    """Return the error for a file that cannot be written where ``option`` says."""
    return OutputError(
        f"{path}: it cannot be written ({error.strerror or error})",
        expected="a writable folder with room for it",
        fix=f"Choose another {option}, or make room",
    )


def _tensor_values(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in tensors]


def _tensor_info(value: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(value["name"], value["dtype"], tuple(value["shape"]))


def describe_engine(
    engine_path: Path,
    *,
    sha256: str,
    source: OnnxSource,
    info: BuilderInfo,
    options: BuildOptions,
    precision: tuple[str, ...],
) -> EngineManifest:
    """Return the manifest of an engine that is written, and not yet under its own name.

    Args:
        engine_path: Where it will be; it is at ``partial_path`` of that.
        sha256: Its SHA-256.
        source: The graph it was built from.
        info: The library that built it.
        options: What was chosen.
        precision: Element types of the network.

    Raises:
        EngineBuildError: The file contradicts the build.
    """
    path = partial_path(engine_path)
    header = read_header(path)
    size = path.stat().st_size
    stem = source.path.stem
    reason = info.reason or (
        f"{stem} is one of a model's several graphs; those have no engine runner"
        if stem in PARTS
        else "building does not run engines; the engine runner and parity do"
    )
    return EngineManifest(
        engine=engine_path.name,
        engine_sha256=sha256,
        engine_size_bytes=size,
        graph_sha256=sha256_of_graph(path, header),
        source=source.path.name,
        source_sha256=source.sha256,
        provenance={
            key: source.metadata[PREFIX + key]
            for key in PROVENANCE
            if PREFIX + key in source.metadata
        },
        layout=source.metadata.get(f"{PREFIX}layout", ""),
        tasks=tuple(source.structured("tasks", TASKS) or ()),
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=tuple(options.profiles),
        precision=precision,
        tf32=options.tf32,
        builder=info.name,
        builder_version=info.version,
        options={key: value for key, value in options.given().items() if key != "tf32"},
        libraries=_library_versions(info.name),
        targets=header.capabilities if header else tuple(filter(None, (info.gpu,))),
        validated=(
            BuildCheck("the network has the graph's inputs and outputs", PASSED),
            BuildCheck("the profiles fit every input", PASSED),
            *_header_checks(header, size, engine_path, info, options),
            BuildCheck(
                "a GPU opens the engine and finds these inputs and outputs", NOT_RUN, reason
            ),
            BuildCheck("its outputs equal the graph's", NOT_RUN, reason),
        ),
    )


def _header_checks(
    header: EngineHeader | None,
    size: int,
    engine_path: Path,
    info: BuilderInfo,
    options: BuildOptions,
) -> list[BuildCheck]:
    wanted = sorted(options.compute_capabilities)
    targets = sorted(header.capabilities) if header else []
    rows: list[tuple[str, object, object]] = [
        ("the header gives the file's size", header and header.size_bytes, size),
        ("the header gives the builder's version", header and header.version, info.version),
        ("the header names the GPUs asked for", targets, wanted or targets),
    ]
    if header is None:
        reason = f"the header layout of {info.name} {info.version} is not known"
        return [BuildCheck(check, NOT_RUN, reason) for check, _, _ in rows]
    for check, found, expected in rows:
        if found != expected:
            raise EngineBuildError(
                f"{engine_path.name}: {check}: no, its header says {found}",
                expected=f"{expected}: otherwise the file is refused, or runs where it should not",
                fix="Build it again; if this stays, report it with the library's version",
            )
    return [BuildCheck(check, PASSED) for check, _, _ in rows]


def _library_versions(builder_name: str) -> dict[str, str]:
    packages = [
        builder_name + ending + part for ending in _PACKAGE_ENDINGS for part in _PACKAGE_PARTS
    ]
    found = {"mtl-export": VERSION}
    for package in ("onnx", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))
