"""An engine file -> a callable model on the GPU.

Nothing on a GPU is touched before the ``with`` block. Device memory is torch's. The
host checks what the engine cannot: TensorRT's Gather answers an id outside the table
with zeros, which look like the base model, so task ids are checked against the
manifest before each call.

Floating outputs come back as float64, as from every runtime. Outputs whose size depends
on the data are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import BackendMissingError, EngineRunError, IntegrityError, shortened
from mtl_export.names import TASK_IDS
from mtl_export.tensorrt.api import FULL, Library, TrtObject, load_library
from mtl_export.tensorrt.available import INSTALL_FULL, INSTALL_RTX, find_gpu, why_not_runnable
from mtl_export.tensorrt.manifest import EngineManifest, manifest_path
from mtl_export.tensorrt.shapes import Profile
from mtl_export.tensorrt.source import numpy_name

if TYPE_CHECKING:
    import torch

    from mtl_export.checkpoint.tensors import Array


class TensorRTBackend:
    """Runs one engine.

        with TensorRTBackend(Path("engines/model.engine")) as backend:
            logits = backend.infer({"input_ids": ..., "task_ids": ...})["logits"]

    Attributes:
        name: ``tensorrt``, as in reports.
        engine_path: The engine's file; its manifest is in the same folder.
    """

    def __init__(self, engine_path: Path) -> None:
        self.name = "tensorrt"
        self.engine_path = engine_path
        self._session: EngineSession | None = None

    @cached_property
    def manifest(self) -> EngineManifest:
        """Return the engine's manifest.

        Raises:
            IntegrityError: It is missing or malformed.
        """
        return EngineManifest.read(manifest_path(self.engine_path))

    def why_not_runnable(self) -> str:
        """Return why the engine cannot run on this machine, or "" if it can."""
        try:
            library = load_library(self.manifest.builder)
        except ImportError as error:
            return f"{self.manifest.builder} cannot be loaded ({error})"
        if library.is_rtx and library.version != self.manifest.builder_version:
            return (
                f"it was built by {library.name} {self.manifest.builder_version}, and engines "
                f"open in that release only; {library.version} is installed"
            )
        if self.manifest.options.get("strip_weights"):
            return "its weights were left out (--strip-weights), and restore_weights puts them back"
        return why_not_runnable(library, self.manifest.targets)

    def __enter__(self) -> TensorRTBackend:
        """Load the engine onto the GPU.

        Raises:
            BackendMissingError: It cannot run on this machine.
            IntegrityError: The engine is not the one its manifest describes.
            EngineRunError: The library refuses to open it.
        """
        reason = self.why_not_runnable()
        if reason:
            install = INSTALL_FULL if self.manifest.builder == FULL else INSTALL_RTX
            raise BackendMissingError(
                f"{self.engine_path}: not runnable here: {reason}",
                expected=f"a GPU of compute capability {' or '.join(self.manifest.targets)}",
                fix="" if find_gpu().problem else f"On such a GPU: {install}",
            )
        found = sha256_of_file(self.engine_path) if self.engine_path.is_file() else "no file"
        if found != self.manifest.engine_sha256:
            raise IntegrityError(
                f"{self.engine_path}: SHA-256 {found}",
                expected=f"{self.manifest.engine_sha256}, which its manifest was written for",
                fix="Build the engine again with mtl-export trt",
            )
        library = load_library(self.manifest.builder)
        self._session = EngineSession(library, self.engine_path, self.manifest)
        return self

    def __exit__(self, *_: object) -> None:
        """Free the engine and its memory."""
        self._session = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the engine's outputs for ``inputs``, by name.

        Raises:
            EngineRunError: A task id is outside the table; an input is missing, of another
                type, or of a shape that no profile admits; or the run failed.
        """
        profile = self.check_inputs(inputs)
        if self._session is None:
            raise EngineRunError(
                f"{self.engine_path}: the engine is not open",
                expected="infer inside the with block",
                fix="Write: with TensorRTBackend(path) as backend",
            )
        return self._session.run(inputs, profile)

    def check_inputs(self, inputs: Mapping[str, Array]) -> int:
        """Return the number of the first profile that admits ``inputs``; needs no GPU.

        Raises:
            EngineRunError: A task id is outside the table, or the inputs do not fit.
        """
        manifest = self.manifest
        declared = {tensor.name: tensor for tensor in manifest.inputs}
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        problems = [f"{name} is not an input" for name in inputs if name not in declared]
        for name, tensor in declared.items():
            if name not in inputs:
                problems.append(f"{name} is missing")
            elif inputs[name].dtype.name != tensor.dtype:
                problems.append(f"{name} is {inputs[name].dtype.name}, not {tensor.dtype}")
            elif not tensor.admits(shapes[name]):
                problems.append(f"{name} has shape {list(shapes[name])}, not {list(tensor.shape)}")
        if problems:
            raise EngineRunError(
                f"{self.engine_path}: {'; '.join(problems)}",
                expected="; ".join(str(tensor) for tensor in manifest.inputs),
                fix="Give exactly these inputs",
            )
        if TASK_IDS in inputs and manifest.tasks:
            _refuse_unknown_tasks(inputs[TASK_IDS], manifest)
        for number, profile in enumerate(manifest.profiles or (Profile({}),)):
            if profile.admits(shapes):
                return number
        raise EngineRunError(
            f"{self.engine_path}: no profile admits {_shapes_text(shapes)}",
            expected=" or ".join(
                " to ".join(
                    _shapes_text({name: limits[end] for name, limits in profile.shapes.items()})
                    for end in (0, 2)
                )
                for profile in manifest.profiles
            ),
            fix="Split the batch, or build the engine with larger --max-shapes",
        )


class EngineSession:
    """An engine on the GPU, with one execution context and one stream.

    Args:
        library: Its library.
        path: Its file.
        manifest: What it should be.

    Raises:
        BackendMissingError: torch sees no CUDA device.
        EngineRunError: The library refuses to open it.
        IntegrityError: It is not what its manifest says.
    """

    def __init__(self, library: Library, path: Path, manifest: EngineManifest) -> None:
        import torch

        if not torch.cuda.is_available():
            raise BackendMissingError(
                f"{path}: not runnable here: torch {torch.__version__} sees no CUDA device",
                expected="a torch built for CUDA, whose tensors are the runner's device memory",
                fix="Install torch for CUDA (https://pytorch.org/get-started)",
            )
        self._library = library
        self._path = path
        self._manifest = manifest
        with library.log.collect() as errors:
            # The stream also makes the CUDA context that TensorRT is to share.
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._runtime = runtime = library.trt.Runtime(library.log.handle)
            self._engine = engine = runtime.deserialize_cuda_engine(path.read_bytes())
            context = None if engine is None else engine.create_execution_context()
            if context is None:
                raise self._refusal("the engine cannot be opened", errors)
        self._context: TrtObject = context
        self._compare_with_manifest()

    def run(self, inputs: Mapping[str, Array], profile: int) -> dict[str, Array]:
        """Return the outputs by name, in host memory."""
        import numpy as np
        import torch

        context = self._context
        handle = self._stream.cuda_stream
        with self._library.log.collect() as errors, torch.cuda.stream(self._stream):
            taken = context.set_optimization_profile_async(profile, handle)
            # These own the memory that the engine reads and writes until it is done.
            held = []
            for name, array in inputs.items():
                # A copy: torch warns about arrays that may not be written.
                tensor_on_gpu = torch.from_numpy(np.array(array, order="C")).cuda()
                held.append(_addressable(tensor_on_gpu))
                taken &= context.set_input_shape(name, tuple(array.shape))
                taken &= context.set_tensor_address(name, held[-1].data_ptr())
            outputs = {}
            for info in self._manifest.outputs:
                shape = tuple(context.get_tensor_shape(info.name))
                if min(shape, default=0) < 0:
                    raise self._refusal(f"the size of output {info.name} is not known", errors)
                outputs[info.name] = torch.empty(
                    shape, dtype=getattr(torch, info.dtype), device="cuda"
                )
                held.append(_addressable(outputs[info.name]))
                taken &= context.set_tensor_address(info.name, held[-1].data_ptr())
            if not taken or not context.execute_async_v3(handle):
                raise self._refusal("the run failed", errors)
            self._stream.synchronize()
        return {name: _on_host(output) for name, output in outputs.items()}

    def _compare_with_manifest(self) -> None:
        engine, trt = self._engine, self._library.trt
        found: dict[bool, dict[str, str]] = {True: {}, False: {}}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found[is_input][name] = numpy_name(engine.get_tensor_dtype(name))
        ends = {True: self._manifest.inputs, False: self._manifest.outputs}
        wanted = {key: {one.name: one.dtype for one in tensors} for key, tensors in ends.items()}
        profiles = engine.num_optimization_profiles
        if found != wanted or profiles != max(len(self._manifest.profiles), 1):
            raise IntegrityError(
                f"{self._path}: it has {found[True]} -> {found[False]}, {profiles} profiles",
                expected=f"{wanted[True]} -> {wanted[False]}, because its manifest says so",
                fix="Build the engine again with mtl-export trt",
            )

    def _refusal(self, found: str, errors: list[str]) -> EngineRunError:
        said = "; ".join(errors) or "it gave no reason"
        return EngineRunError(
            f"{self._path}: {self._library.name} {self._library.version}: {found}: {said}",
            expected="an engine of this library for this GPU, and shapes within a profile",
            fix="Rerun with -vv for its whole log",
        )


def _refuse_unknown_tasks(ids: Array, manifest: EngineManifest) -> None:
    count = len(manifest.tasks)
    outside = sorted({int(task_id) for task_id in ids.ravel() if not 0 <= task_id < count})
    if outside:
        raise EngineRunError(
            f"{TASK_IDS}: ids {shortened(map(str, outside))} are outside the table",
            expected=f"0 to {count - 1}: {shortened(str(task['name']) for task in manifest.tasks)}",
            fix="Look ids up in the manifest's tasks",
        )


def _addressable(tensor_on_gpu: torch.Tensor) -> torch.Tensor:
    # An empty tensor has no address, and TensorRT refuses a null one.
    return tensor_on_gpu if tensor_on_gpu.numel() else tensor_on_gpu.new_empty(1)


def _on_host(output: torch.Tensor) -> Array:
    values: Array = (output.double() if output.is_floating_point() else output).cpu().numpy()
    return values


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
