"""This machine -> which TensorRT can build here, and whether its engines can run here.

    tensorrt        builds by timing kernels, so it needs the GPU it builds for
    tensorrt_rtx    builds anywhere, for named GPUs; compute capability 9.0 and 10.x
                    (H100, H200, B200) are not among them

So ``tensorrt`` is taken when it and a GPU are there, else ``tensorrt_rtx``.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from mtl_export.errors import BackendMissingError
from mtl_export.tensorrt.api import FULL, NAMES, RTX, Library, load_library
from mtl_export.tensorrt.header import DEFAULT_TARGETS

INSTALL_RTX = "pip install tensorrt_rtx_cu13"
INSTALL_FULL = "pip install 'tensorrt>=10.13'"
_MAJOR_ATTRIBUTE = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR_ATTRIBUTE = 76


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU, or why there is none.

    Attributes:
        capability: Compute capability such as ``8.6``; "" without a GPU.
        problem: Why no GPU can be used; "" with one.
    """

    capability: str
    problem: str


@dataclass(frozen=True)
class BuilderInfo:
    """The library that builds here.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        version: Its version.
        gpu: Compute capability of the GPU here; "" without one.
        reason: Why an engine it builds cannot be run here; "" if it can.
    """

    name: str
    version: str
    gpu: str
    reason: str

    @property
    def can_run(self) -> bool:
        """Return whether an engine it builds can be run here."""
        return not self.reason


def available_builder(name: str | None = None) -> BuilderInfo:
    """Return the TensorRT that builds on this machine.

    Args:
        name: Insist on this library instead of choosing.

    Raises:
        BackendMissingError: None is installed, or the only one needs a GPU.
    """
    gpu = find_gpu()
    libraries: dict[str, Library] = {}
    problems: list[str] = []
    for candidate in NAMES if name is None else (name,):
        try:
            libraries[candidate] = load_library(candidate)
        except ImportError as error:
            is_absent = isinstance(error, ModuleNotFoundError) and error.name == candidate
            why = "not installed" if is_absent else f"installed but cannot be loaded ({error})"
            problems.append(f"{candidate} is {why}")
    builder = None if gpu.problem else libraries.get(FULL)
    library = builder or libraries.get(RTX)
    if library is not None:
        reason = why_not_runnable(library, ())
        return BuilderInfo(library.name, library.version, gpu.capability, reason)
    if FULL in libraries:
        raise BackendMissingError(
            f"tensorrt {libraries[FULL].version}: it cannot build here: {gpu.problem}",
            expected="a GPU, on which tensorrt times kernels, or tensorrt_rtx, which times none",
            fix=INSTALL_RTX,
        )
    raise BackendMissingError(
        f"TensorRT: {'; '.join(problems)}",
        expected=f"{' or '.join(NAMES) if name is None else name} to be importable",
        fix=INSTALL_FULL if name == FULL else INSTALL_RTX,
    )


def why_not_runnable(library: Library, capabilities: tuple[str, ...]) -> str:
    """Return why an engine for ``capabilities`` cannot run here, or "" if it can.

    Args:
        library: The library that wrote it.
        capabilities: Compute capabilities it was built for; empty for its default.
    """
    gpu = find_gpu()
    if gpu.problem:
        return gpu.problem
    known = capabilities or (DEFAULT_TARGETS if library.is_rtx else ())
    is_later = any(name.startswith(">") for name in known) and _number(gpu.capability) > max(
        map(_number, known)
    )
    if known and gpu.capability not in known and not is_later:
        return (
            f"the GPU has compute capability {gpu.capability}, the engine runs on "
            f"{', '.join(known)}"
        )
    # The version tells CPU builds apart without the seconds that importing torch takes.
    try:
        found = version("torch")
    except PackageNotFoundError:
        return "torch is not installed, and the runner keeps device memory in torch tensors"
    return f"torch {found} has no CUDA" if found.endswith("+cpu") else ""


def rtx_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """Return the compute capabilities that this TensorRT-RTX can target, ascending."""
    if not hasattr(trt, "ComputeCapability"):
        return ()
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{digits[:-1]}.{digits[-1]}" for digits in sorted(names, key=int))


@cache
def find_gpu() -> Gpu:
    """Return the first visible GPU by asking the driver; no memory on it is touched."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Gpu("", f"there is no NVIDIA driver ({library} cannot be loaded)")
    count, device = ctypes.c_int(), ctypes.c_int()
    if code := cuda.cuInit(0):
        return Gpu("", f"the NVIDIA driver finds no GPU (cuInit gives {code})")
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Gpu("", "the NVIDIA driver shows no GPU (see CUDA_VISIBLE_DEVICES)")
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    numbers = []
    for attribute in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    return Gpu(".".join(numbers), "")


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.removeprefix(">").partition(".")
    return int(major), int(minor)
