"""One ONNX file per task -> one engine per task, the structure read once.

Merged models of one checkpoint differ in weights only. Their common structure is kept
as one small message with the first model's weights as placeholders; each task's build
loads it and points the parser at that task's mapped weights (``load_model_proto``,
``load_initializer``, ``parse_model_proto``). The engines equal those of plain builds
byte for byte. A file that keeps weights in a form that cannot be pointed at is built
plainly, and so is every file where the library has no such calls.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mtl_export.checkpoint.files.external_files import tensors_of
from mtl_export.tensorrt.api import TrtObject, load_library
from mtl_export.tensorrt.available import available_builder
from mtl_export.tensorrt.build import Parse, build_from
from mtl_export.tensorrt.callbacks import Progress
from mtl_export.tensorrt.manifest import EngineManifest
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.source import load_structure, read_source

if TYPE_CHECKING:
    import onnx

# initializer name -> its bytes as an array of uint8
Weights: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Structure:
    """What models of one structure share.

    Attributes:
        path: The first model, beside which its external data lies.
        message: The first model, serialised.
    """

    path: Path
    message: bytes


class SharedBuilds:
    """Builds engines one after the other; models of one structure have it read once.

    Args:
        library_name: ``tensorrt`` or ``tensorrt_rtx`` instead of the better one here.

    Raises:
        BackendMissingError: No TensorRT can build here.
    """

    def __init__(self, library_name: str | None = None) -> None:
        self._info = available_builder(library_name)
        self._can_feed = hasattr(load_library(self._info.name).trt.OnnxParser, "load_model_proto")
        # a model without what may differ, hashed -> the first that was like it
        self._known: dict[str, Structure] = {}

    def build(
        self,
        onnx_path: Path,
        engine_path: Path,
        *,
        options: BuildOptions,
        progress: Progress | None = None,
    ) -> EngineManifest:
        """Return the manifest of the engine of ``onnx_path``, written to ``engine_path``.

        Raises:
            UsageError: A profile or an option does not fit.
            EngineBuildError: The graph or the build was refused.
            OutputError: The engine cannot be written.
        """
        with ExitStack() as open_files:
            source = read_source(onnx_path)
            fed = self._fed(onnx_path, open_files)
            return build_from(
                source,
                engine_path,
                info=self._info,
                options=options,
                parse=plainly(onnx_path) if fed is None else lambda parser: feed(parser, *fed),
                progress=progress if fed is None else forgetting(fed[1], progress),
            )

    def _fed(self, path: Path, open_files: ExitStack) -> tuple[Structure, Weights] | None:
        """Return the structure of ``path`` and its weights, if a parser can be fed them."""
        model = load_structure(path) if self._can_feed else None
        weights = None if model is None else weights_of(path, model, open_files)
        key = None if model is None or weights is None else structure_key(path, model)
        if model is None or weights is None or key is None:
            return None
        if key not in self._known:
            message = model.SerializeToString(deterministic=True)
            self._known[key] = Structure(path, bytes(message))
        return self._known[key], weights


def plainly(path: Path) -> Parse:
    """Return what has a parser read ``path`` itself."""
    return lambda parser: bool(parser.parse_from_file(str(path)))


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


def forgetting(weights: Weights, progress: Progress | None) -> Progress:
    """Return ``progress`` that also lets go of pages of mapped weights, while it is told.

    The builder reads them once and keeps its own copy; without this the process would hold
    them twice until the end. What is read again comes from the file again.
    """
    owners = {id(owner): owner for owner in map(_owner, weights.values())}
    mapped = [owner for owner in owners.values() if isinstance(owner, mmap.mmap)]

    def told(phase: str, fraction: float) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            for one in mapped:
                one.madvise(mmap.MADV_DONTNEED)
        if progress is not None:
            progress(phase, fraction)

    return told


def _owner(array: Any) -> object:
    # numpy holds a buffer by a view of it
    return array.base.obj if isinstance(array.base, memoryview) else array.base


def structure_key(path: Path, model: onnx.ModelProto) -> str | None:
    """Return the hash of what models that share a structure have; None if it is hidden."""
    import onnx

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
            tensor.raw_data = _stored(path.parent, tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    if any(tensor.data_location == tensor.EXTERNAL for tensor in tensors_of(bare)):
        return None
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _stored(folder: Path, tensor: onnx.TensorProto) -> bytes:
    # onnx's own reader refuses hard links, which tasks' folders may share their data by.
    from onnx.external_data_helper import ExternalDataInfo

    info = ExternalDataInfo(tensor)
    with (folder / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        return file.read(info.length) if info.length else file.read()


def _is_weight(tensor: onnx.TensorProto) -> bool:
    # Integers of 32 and 64 bits are shapes and indices: they shape the network.
    return tensor.data_type not in (tensor.INT32, tensor.INT64, tensor.BOOL, tensor.STRING)


def weights_of(path: Path, model: onnx.ModelProto, open_files: ExitStack) -> Weights | None:
    """Return the weights of ``model`` where they lie; None if some cannot be pointed at."""
    import numpy
    from onnx.external_data_helper import ExternalDataInfo

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
