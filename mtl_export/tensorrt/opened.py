"""An engine file <-> an engine on the GPU whose weights can be changed.

TensorRT only logs what it cannot do here; each call is checked.
"""

from __future__ import annotations

from pathlib import Path

from mtl_export.errors import EngineBuildError, OutputError
from mtl_export.tensorrt.api import Library, TrtObject
from mtl_export.tensorrt.callbacks import FileSink
from mtl_export.tensorrt.differences import refused


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
            raise not_taken(library, path, "the refitted engine cannot be written out", errors)
    return _write(path, memoryview(plan))


def not_taken(library: Library, path: Path, found: str, errors: list[str]) -> EngineBuildError:
    """Return the error for a call that failed, with what the library logged."""
    said = "; ".join(errors) or "it gave no reason"
    return refused(
        path,
        f"{library.name} {library.version}: {found}: {said}",
        "an engine whose weights can be changed",
        "refit was asked for",
    )


def _write(path: Path, plan: memoryview) -> str:
    """Write an engine; return its SHA-256."""
    try:
        with path.open("wb") as file:
            sink = FileSink(file)
            sink.write(plan.tobytes())
        if sink.problem is not None:
            raise sink.problem
    except OSError as error:
        raise OutputError(
            f"{path}: the engine cannot be written ({error.strerror or error})",
            expected="a writable folder with room for about the size of the weights",
            fix="Choose another --output, or make room",
        ) from error
    return sink.sha256
