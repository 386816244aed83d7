"""What a user may choose about a build, and which choices a library cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_export.errors import UsageError
from mtl_export.tensorrt.api import Library
from mtl_export.tensorrt.available import rtx_capabilities
from mtl_export.tensorrt.shapes import Profile

MAX_OPTIMIZATION_LEVEL = 5
# TensorRT's HardwareCompatibilityLevel, as users write it.
HARDWARE_LEVELS = ("ampere-plus", "same-compute-capability")
# Releases whose refittable engines can drop a GEMM's bias.
# Source: docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html
LOSES_BIASES = ("11.3.",)
# What TensorRT-RTX has no part of -> why, and what to do instead.
RTX_REFUSALS = {
    "version compatibility": (
        "its engines belong to the exact release that wrote them",
        "Leave --version-compatible out, and build again for each release",
    ),
    "hardware compatibility": (
        "it ignores the level with a warning; its engines are made for named GPUs",
        "Name the GPUs with --compute-capability instead",
    ),
    "timing cache": (
        "it times no kernels when it builds, and its timing cache does nothing",
        "Leave --timing-cache out",
    ),
    "stripped weights": (
        "it cannot build engines without their weights unless the GPU is there",
        "Leave --strip-weights out; engines of one model share their graph part anyway",
    ),
    "refit": (
        "it refits only on a GPU, and building again takes it no longer",
        "Leave --refit out; --layout per-task reads the structure once anyway",
    ),
}


@dataclass(frozen=True)
class BuildOptions:
    """What the user chose about a build.

    Attributes:
        profiles: Shapes to accept, at least one if an input is dynamic.
        workspace_bytes: Scratch memory that kernels may ask for; None for the default.
        optimization_level: 0 to 5; None for the default.
        tf32: Whether float32 products may be rounded to TF32.
        compute_capabilities: GPUs to build for, such as ``8.6`` (TensorRT-RTX only).
        version_compatible: Whether later releases must run the engine (TensorRT only).
        hardware_compatibility: One of ``HARDWARE_LEVELS``, or None (TensorRT only).
        timing_cache: File that keeps kernel timings from build to build (TensorRT only).
        strip_weights: Whether weights stay out of the engine (TensorRT only).
        refit: Whether one engine becomes those of all tasks (``refit.py``; TensorRT only).
        refittable: Names of the initializers whose values may then change, and no others.
    """

    profiles: Sequence[Profile]
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    compute_capabilities: Sequence[str] = ()
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    timing_cache: Path | None = None
    strip_weights: bool = False
    refit: bool = False
    refittable: Sequence[str] = ()

    def given(self) -> dict[str, object]:
        """Return the options that differ from the default, for the manifest."""
        values = {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "compute_capabilities": list(self.compute_capabilities) or None,
            "version_compatible": self.version_compatible or None,
            "hardware_compatibility": self.hardware_compatibility,
            "timing_cache": self.timing_cache.name if self.timing_cache else None,
            "strip_weights": self.strip_weights or None,
            "refit": self.refit or None,
            "refittable": list(self.refittable) or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def member_name(capability: str) -> str:
    """Return the library's name of a compute capability: ``8.6`` is ``SM86``."""
    return f"SM{capability.replace('.', '')}"


def check_options(library: Library, options: BuildOptions) -> None:
    """Refuse options that ``library`` would ignore or round, and a refit of nothing.

    Raises:
        UsageError: One of them is out of range, unknown, or of another library.
    """
    check_choices(library, options)
    if options.refit and not options.refittable:
        raise UsageError(
            "refit: there are no weights to change",
            expected=(
                "the graphs of several tasks that differ in weights, because refit makes the "
                "engines of the other tasks from that of the first"
            ),
            fix="Leave --refit out, or add --layout per-task",
        )


def check_choices(library: Library, options: BuildOptions) -> None:
    """Refuse what can be told before any graph is there: all but which weights may change.

    Raises:
        UsageError: One of the options is out of range, unknown, or of another library.
    """
    level = options.optimization_level
    if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
        raise UsageError(
            f"optimization level: it is {level}",
            expected=(
                f"0 to {MAX_OPTIMIZATION_LEVEL}, because the builder takes the nearest of these "
                "without a word"
            ),
            fix="Give one of these",
        )
    if options.workspace_bytes is not None and options.workspace_bytes < 1:
        raise UsageError(
            f"workspace: it is {options.workspace_bytes} bytes",
            expected="at least 1 byte",
            fix="Give more, or leave it out",
        )
    _check_portability(library, options)
    if options.refit:
        _check_refit(library, options)
    if options.compute_capabilities:
        _check_targets(library, options.compute_capabilities)


def _check_portability(library: Library, options: BuildOptions) -> None:
    """Refuse what TensorRT-RTX ignores, warns of, or fails at long after it was asked."""
    level = options.hardware_compatibility
    if level is not None and level not in HARDWARE_LEVELS:
        raise UsageError(
            f"hardware compatibility: it is {level!r}",
            expected=f"one of {', '.join(HARDWARE_LEVELS)}",
            fix="Give one of these",
        )
    asked = {
        "version compatibility": options.version_compatible,
        "hardware compatibility": level is not None,
        "timing cache": options.timing_cache is not None,
        "stripped weights": options.strip_weights,
        "refit": options.refit,
    }
    refused = [name for name, wanted in asked.items() if wanted] if library.is_rtx else []
    if refused:
        why, fix = RTX_REFUSALS[refused[0]]
        raise UsageError(
            f"{refused[0]}: {library.name} {library.version} builds here, and does not offer it",
            expected=f"tensorrt, and the GPU it builds for, because {why}",
            fix=fix,
        )


def _check_refit(library: Library, options: BuildOptions) -> None:
    """Refuse a refit that contradicts another choice, or would give wrong answers."""
    if options.strip_weights:
        raise UsageError(
            "stripped weights: refit was asked for as well",
            expected=(
                "one of them, because refit gives each engine its task's weights, and stripping "
                "takes them out"
            ),
            fix="Leave --strip-weights or --refit out",
        )
    if library.version.startswith(LOSES_BIASES):
        raise UsageError(
            f"refit: {library.name} {library.version} can lose biases of engines that refit",
            expected=(
                "another release, because NVIDIA says so of it: a dropped bias counts as 0, even "
                "before any refit"
            ),
            fix="Leave --refit out, or install another release",
        )


def _check_targets(library: Library, capabilities: Sequence[str]) -> None:
    known = rtx_capabilities(library.trt)
    if not known:
        raise UsageError(
            f"compute capabilities: {library.name} {library.version} cannot build for another GPU",
            expected="tensorrt_rtx, because tensorrt builds for the GPU it finds",
            fix="Leave the targets out, or build with tensorrt_rtx",
        )
    unknown = [name for name in capabilities if name not in known]
    if unknown or len(set(capabilities)) < len(capabilities):
        raise UsageError(
            "compute capabilities: "
            + (f"{', '.join(unknown)} is unknown" if unknown else "one is given twice"),
            expected=f"some of {', '.join(known)}, each once",
            fix="Correct the targets",
        )
