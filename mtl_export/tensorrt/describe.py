"""A freshly written engine -> its manifest, after the checks that need no GPU.

What can be wrong with a finished engine and seen from outside: its length, the library
version and the targets in its header. What cannot be seen (that a GPU opens it, that
its numbers are right) is listed as not run, with the reason.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mtl_export.errors import EngineBuildError
from mtl_export.tensorrt.available import BuilderInfo
from mtl_export.tensorrt.header import EngineHeader, read_header, sha256_of_graph
from mtl_export.tensorrt.manifest import (
    NOT_RUN,
    PASSED,
    TASKS,
    BuildCheck,
    EngineManifest,
    partial_path,
)
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.source import PREFIX, OnnxSource
from mtl_export.version import VERSION

# The graphs of models that generate, which hand on keys and values.
PARTS = ("prefill", "decode", "encoder", "decoder", "decoder_with_past")
PROVENANCE = ("version", "family", "base_sha256", "checkpoint_sha256")
_PACKAGE_ENDINGS = ("", "_cu12", "_cu13")
_PACKAGE_PARTS = ("", "_bindings", "_libs")


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
