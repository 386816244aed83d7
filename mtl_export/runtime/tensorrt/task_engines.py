"""One ONNX file per task -> one engine per task, the structure read once.

Merged models of one checkpoint differ in weights only. Their common structure is kept
as one small message with the first model's weights as placeholders; each task's build
loads it and points the parser at that task's mapped weights (``load_model_proto``,
``load_initializer``, ``parse_model_proto``). The engines equal those of plain builds
byte for byte. Where the files differ in more than weights, keep weights in a form that
cannot be pointed at, or the library has no such calls, every task is built plainly.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mtl_export.errors import EngineBuildError
from mtl_export.runtime.tensorrt.api import TrtObject, load_library
from mtl_export.runtime.tensorrt.available import available_builder
from mtl_export.runtime.tensorrt.build import build_engine, build_from
from mtl_export.runtime.tensorrt.callbacks import Progress
from mtl_export.runtime.tensorrt.manifest import EngineManifest
from mtl_export.runtime.tensorrt.options import BuildOptions
from mtl_export.runtime.tensorrt.shapes import Profile
from mtl_export.runtime.tensorrt.source import load_structure, read_source, tensors_of

if TYPE_CHECKING:
    import onnx

# initializer name -> its bytes as an array of uint8
Weights: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class TaskEngine:
    """What became of one task.

    Attributes:
        task: Its name.
        engine_path: The engine's file.
        manifest: The engine's manifest, or None if the build was refused.
        error: Why it was refused, or None.
    """

    task: str
    engine_path: Path
    manifest: EngineManifest | None
    error: EngineBuildError | None


def build_task_engines(
    onnx_paths: Mapping[str, Path],
    engine_paths: Mapping[str, Path],
    *,
    profiles: Sequence[Profile],
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    tf32: bool = False,
    compute_capabilities: Sequence[str] = (),
    progress: Progress | None = None,
    library_name: str | None = None,
) -> Iterator[TaskEngine]:
    """Yield each task's engine as soon as it lies on disk, in the order of ``onnx_paths``.

    A task that is refused is yielded with its error and does not stop the others.

    Args:
        onnx_paths: Task -> merged graph.
        engine_paths: Task -> engine to write.
        profiles: As for ``build_engine``, the same for all tasks.
        workspace_bytes: As for ``build_engine``.
        optimization_level: As for ``build_engine``.
        tf32: As for ``build_engine``.
        compute_capabilities: As for ``build_engine``.
        progress: As for ``build_engine``; the fraction is that of the current task.
        library_name: As for ``build_engine``.

    Raises:
        BackendMissingError: No TensorRT can build here.
        UsageError: A profile or an option does not fit.
        OutputError: An engine cannot be written.
    """
    options = BuildOptions(
        profiles=tuple(profiles),
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        tf32=tf32,
        compute_capabilities=tuple(compute_capabilities),
    )
    structure: Structure | None = None
    has_parts = hasattr(
        load_library(available_builder(library_name).name).trt.OnnxParser, "load_model_proto"
    )
    for task, onnx_path in onnx_paths.items():
        manifest, error = None, None
        try:
            if structure is None and has_parts:
                structure = read_structure(onnx_path)
            manifest = build_with_structure(
                structure,
                onnx_path,
                engine_paths[task],
                options=options,
                progress=progress,
                library_name=library_name,
            )
        except EngineBuildError as refusal:
            error = refusal
        yield TaskEngine(task, engine_paths[task], manifest, error)


@dataclass(frozen=True)
class Structure:
    """What models of one structure share.

    Attributes:
        path: The first model, beside which its external data lies.
        key: The first model without weights, name and metadata, serialised; None if some
            weights are not initializers of the main graph.
        message: The first model, serialised.
    """

    path: Path
    key: bytes | None
    message: bytes


def read_structure(path: Path) -> Structure:
    """Return the structure of the model at ``path``.

    Raises:
        EngineBuildError: It cannot be read.
    """
    model = load_structure(path)
    message = model.SerializeToString(deterministic=True)
    return Structure(path=path, key=_key(path, model), message=message)


def build_with_structure(
    structure: Structure | None,
    onnx_path: Path,
    engine_path: Path,
    *,
    options: BuildOptions,
    progress: Progress | None,
    library_name: str | None,
) -> EngineManifest:
    """Return the manifest of the engine of ``onnx_path``, by ``structure`` where it fits."""
    with ExitStack() as open_files:
        weights = None
        source = read_source(onnx_path)
        if structure is not None:
            weights = _weights(structure, onnx_path, open_files)
        if structure is None or weights is None:
            return build_engine(
                onnx_path,
                engine_path,
                profiles=options.profiles,
                workspace_bytes=options.workspace_bytes,
                optimization_level=options.optimization_level,
                tf32=options.tf32,
                compute_capabilities=options.compute_capabilities,
                progress=progress,
                library_name=library_name,
            )
        shared, fed = structure, weights
        return build_from(
            source,
            engine_path,
            info=available_builder(library_name),
            options=options,
            parse=lambda parser: feed(parser, shared, fed),
            progress=progress,
        )


def feed(parser: TrtObject, structure: Structure, weights: Weights) -> bool:
    """Parse ``structure`` with ``weights``; return whether the parser took all of it."""
    return (
        bool(parser.load_model_proto(structure.message, str(structure.path)))
        and all(
            parser.load_initializer(name, array.ctypes.data, array.nbytes)
            for name, array in weights.items()
        )
        and bool(parser.parse_model_proto())
    )


def _key(path: Path, model: onnx.ModelProto) -> bytes | None:
    """Return what must be equal for two models to share a structure; None if it is hidden."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    bare.graph.ClearField("name")
    bare.graph.ClearField("doc_string")
    for tensor in bare.graph.initializer:
        if _is_weight(tensor):
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        elif tensor.data_location == tensor.EXTERNAL:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    if any(tensor.data_location == tensor.EXTERNAL for tensor in tensors_of(bare)):
        return None
    return bytes(bare.SerializeToString(deterministic=True))


def _is_weight(tensor: onnx.TensorProto) -> bool:
    # Integers of 32 and 64 bits are shapes and indices: they shape the network.
    return tensor.data_type not in (tensor.INT32, tensor.INT64, tensor.BOOL, tensor.STRING)


def _weights(structure: Structure, path: Path, open_files: ExitStack) -> Weights | None:
    import numpy
    from onnx.external_data_helper import ExternalDataInfo

    model = load_structure(path)
    if structure.key is None or _key(path, model) != structure.key:
        return None
    maps: dict[str, mmap.mmap] = {}
    weights = {}
    for tensor in model.graph.initializer:
        if not _is_weight(tensor):
            continue
        if tensor.data_location == tensor.EXTERNAL:
            info = ExternalDataInfo(tensor)
            if not info.length:
                return None
            if info.location not in maps:
                file = open_files.enter_context((path.parent / info.location).open("rb"))
                maps[info.location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            weights[tensor.name] = numpy.frombuffer(
                maps[info.location], numpy.uint8, info.length, info.offset or 0
            )
        elif tensor.raw_data:
            weights[tensor.name] = numpy.frombuffer(tensor.raw_data, numpy.uint8)
        else:
            return None
    return weights
