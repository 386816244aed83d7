"""An engine without its weights, and the graph it was built from -> a whole engine.

``trt --strip-weights`` leaves the weights out, so that an engine is small to ship with
the ONNX graph that holds them. Such an engine takes back the very weights it was built
with and no others (the builder has optimised for them), so the graph's hash is compared
first. TensorRT with a GPU only; it only logs what it cannot do, so each call is checked.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import EngineBuildError, IntegrityError, shortened
from mtl_export.tensorrt.api import Library, TrtObject, load_library
from mtl_export.tensorrt.available import available_builder
from mtl_export.tensorrt.differences import refused
from mtl_export.tensorrt.manifest import EngineManifest, manifest_path, partial_path, unwritable
from mtl_export.tensorrt.source import read_source

STRIPPED = "strip_weights"
RESTORED = "the weights are those of the graph, put back from it"


def restore_weights(stripped_path: Path, onnx_path: Path, engine_path: Path) -> EngineManifest:
    """Return the manifest of the whole engine, written to ``engine_path``.

    The manifest is the caller's to write: ``manifest.write(manifest_path(engine_path))``.

    Args:
        stripped_path: The engine without weights; its manifest is in the same folder.
        onnx_path: The graph it was built from.
        engine_path: The file to write.

    Raises:
        BackendMissingError: The library that built it is not here, or there is no GPU.
        IntegrityError: Engine or graph are not those of the manifest.
        EngineBuildError: The library refuses the engine or the weights.
        OutputError: The engine cannot be written.
    """
    manifest = EngineManifest.read(manifest_path(stripped_path))
    _check(manifest, stripped_path, onnx_path)
    library = load_library(available_builder(manifest.builder).name)
    partial = partial_path(engine_path)
    runtime, engine = open_engine(library, stripped_path)
    try:
        give_weights(library, engine, onnx_path)
        sha256 = write_with_weights(library, engine, partial)
        size_bytes = partial.stat().st_size
        os.replace(partial, engine_path)
        # Not before: the engine lives in it.
        del engine, runtime
    finally:
        with suppress(OSError):
            partial.unlink()
    whole = replace(
        manifest,
        engine=engine_path.name,
        engine_sha256=sha256,
        engine_size_bytes=size_bytes,
        options={name: value for name, value in manifest.options.items() if name != STRIPPED},
    )
    return whole.with_check(RESTORED)


def _check(manifest: EngineManifest, stripped_path: Path, onnx_path: Path) -> None:
    """Refuse another engine, an engine that has its weights, and another graph."""
    wrong = ""
    if not manifest.options.get(STRIPPED):
        wrong = "the engine has its weights"
    elif sha256_of_file(stripped_path) != manifest.engine_sha256:
        wrong = "the engine is not the one its manifest describes"
    elif read_source(onnx_path).sha256 != dict(manifest.source_sha256):
        wrong = f"{onnx_path} is not the graph it was built from"
    if wrong:
        raise IntegrityError(
            f"{stripped_path}: {wrong}",
            expected="an engine of trt --strip-weights, and the very graph it was built from",
            fix="Give both as they were when the engine was built, or build it again",
        )


def open_engine(library: Library, path: Path) -> tuple[TrtObject, TrtObject]:
    """Return the engine at ``path`` on the GPU, after the runtime that it lives in.

    Raises:
        EngineBuildError: The library refuses to open it.
    """
    with library.log.collect() as errors:
        runtime = library.trt.Runtime(library.log.handle)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None or errors:
            raise not_taken(library, path, "the engine cannot be opened", errors)
    return runtime, engine


def give_weights(library: Library, engine: TrtObject, onnx_path: Path) -> None:
    """Give ``engine`` the graph's values of all its weights that may change.

    Raises:
        EngineBuildError: The library does not take them, or the graph lacks some.
    """
    with library.log.collect() as errors:
        refitter = library.trt.Refitter(engine, library.log.handle)
        parser_refitter = library.trt.OnnxParserRefitter(refitter, library.log.handle)
        taken = parser_refitter.refit_from_file(str(onnx_path))
        missing = sorted(refitter.get_missing_weights())
        if missing:
            errors.append(f"{shortened(missing)} are not in the graph")
        if not taken or errors or not refitter.refit_cuda_engine() or errors:
            raise not_taken(library, onnx_path, "the weights were not taken", errors)


def write_with_weights(library: Library, engine: TrtObject, path: Path) -> str:
    """Write ``engine`` as it is now, still refittable; return the file's SHA-256.

    Raises:
        EngineBuildError: The library does not give it out.
        OutputError: It cannot be written.
    """
    trt = library.trt
    with library.log.collect() as errors:
        serialization = engine.create_serialization_config()
        serialization.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
            serialization.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        plan = engine.serialize_with_config(serialization)
        if plan is None or errors:
            raise not_taken(library, path, "the engine cannot be written out", errors)
    try:
        path.write_bytes(memoryview(plan))
    except OSError as error:
        raise unwritable(path, error) from error
    return hashlib.sha256(memoryview(plan)).hexdigest()


def not_taken(library: Library, path: Path, found: str, errors: list[str]) -> EngineBuildError:
    """Return the error for a call that failed, with what the library logged."""
    said = "; ".join(errors) or "it gave no reason"
    return refused(
        path,
        f"{library.name} {library.version}: {found}: {said}",
        "an engine whose weights can be changed",
    )
