"""What a user may choose about a build, and which choices a library cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtl_export.errors import UsageError
from mtl_export.runtime.tensorrt.api import Library
from mtl_export.runtime.tensorrt.available import rtx_capabilities
from mtl_export.runtime.tensorrt.shapes import Profile

MAX_OPTIMIZATION_LEVEL = 5


@dataclass(frozen=True)
class BuildOptions:
    """What the user chose about a build.

    Attributes:
        profiles: Shapes to accept, at least one if an input is dynamic.
        workspace_bytes: Scratch memory that kernels may ask for; None for the default.
        optimization_level: 0 to 5; None for the default.
        tf32: Whether float32 products may be rounded to TF32.
        compute_capabilities: GPUs to build for, such as ``8.6`` (TensorRT-RTX only).
    """

    profiles: Sequence[Profile]
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    compute_capabilities: Sequence[str] = ()

    def given(self) -> dict[str, object]:
        """Return the options that differ from the default, for the manifest."""
        values = {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "compute_capabilities": list(self.compute_capabilities) or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def member_name(capability: str) -> str:
    """Return the library's name of a compute capability: ``8.6`` is ``SM86``."""
    return f"SM{capability.replace('.', '')}"


def check_options(library: Library, options: BuildOptions) -> None:
    """Refuse options that ``library`` would ignore or round.

    Raises:
        UsageError: One of them is out of range, unknown, or of another library.
    """
    level = options.optimization_level
    if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
        raise UsageError(
            where="optimization level",
            found=f"it is {level}",
            expected=f"0 to {MAX_OPTIMIZATION_LEVEL}",
            why="the builder takes the nearest of these without a word",
            fix="Give one of these",
        )
    if options.workspace_bytes is not None and options.workspace_bytes < 1:
        raise UsageError(
            where="workspace",
            found=f"it is {options.workspace_bytes} bytes",
            expected="at least 1 byte",
            fix="Give more, or leave it out",
        )
    if not options.compute_capabilities:
        return
    known = rtx_capabilities(library.trt)
    if not known:
        raise UsageError(
            where="compute capabilities",
            found=f"{library.name} {library.version} cannot build for another GPU",
            expected="tensorrt_rtx",
            why="tensorrt builds for the GPU it finds",
            fix="Leave the targets out, or build with tensorrt_rtx",
        )
    unknown = [name for name in options.compute_capabilities if name not in known]
    repeated = len(set(options.compute_capabilities)) < len(options.compute_capabilities)
    if unknown or repeated:
        raise UsageError(
            where="compute capabilities",
            found=f"{', '.join(unknown)} is unknown" if unknown else "one is given twice",
            expected=f"some of {', '.join(known)}, each once",
            why=f"{library.name} {library.version} has code for these",
            fix="Correct the targets",
        )
