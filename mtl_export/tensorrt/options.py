"""A user's choices for a build, and those that a library cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mtl_export.errors import UsageError
from mtl_export.names import HARDWARE_LEVELS
from mtl_export.tensorrt.api import Library
from mtl_export.tensorrt.available import rtx_capabilities
from mtl_export.tensorrt.shapes import Profile

# Releases whose refittable engines can drop a GEMM's bias.
# Source: docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html
LOSES_BIASES = ("11.3.",)
# Field that TensorRT-RTX cannot follow -> its name, why, and what to do instead.
RTX_REFUSALS = {
    "version_compatible": (
        "version compatibility",
        "its engines belong to the exact release that wrote them",
        "Leave --version-compatible out, and build again for each release",
    ),
    "hardware_compatibility": (
        "hardware compatibility",
        "it ignores the level with a warning; its engines are made for named GPUs",
        "Name the GPUs with --compute-capability instead",
    ),
    "timing_cache": (
        "timing cache",
        "it times no kernels when it builds, and its timing cache does nothing",
        "Leave --timing-cache out",
    ),
    "strip_weights": (
        "stripped weights",
        "it cannot build engines without their weights unless the GPU is there",
        "Leave --strip-weights out; engines of one model share their graph part anyway",
    ),
    "refit": (
        "refit",
        "it refits only on a GPU, and building again takes it no longer",
        "Leave --refit out: each engine is then built on its own",
    ),
}


@dataclass(frozen=True)
class BuildOptions:
    """The user's choices for a build.

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

    profiles: Sequence[Profile] = ()
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
        """Return the options that differ from the default, profiles apart, as JSON's types."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        del values["profiles"]
        for name in ("compute_capabilities", "refittable"):
            values[name] = [*values[name][0]], []
        if self.timing_cache is not None:
            values["timing_cache"] = self.timing_cache.name, None
        return {name: value for name, (value, default) in values.items() if value != default}


def check_options(library: Library, options: BuildOptions) -> None:
    """Refuse options that ``library`` would ignore or round, or that contradict each other.

    Raises:
        UsageError: One of them is out of range, unknown, or of another library.
    """
    level, workspace = options.optimization_level, options.workspace_bytes
    hardware = options.hardware_compatibility
    for name, value, is_right, expected in (
        ("optimization level", level, level is None or 0 <= level <= 5, "0 to 5"),
        ("workspace", workspace, workspace is None or workspace > 0, "at least 1 byte"),
        (
            "hardware compatibility",
            hardware,
            hardware in (None, *HARDWARE_LEVELS),
            f"one of {', '.join(HARDWARE_LEVELS)}",
        ),
    ):
        if not is_right:
            raise UsageError(
                f"{name}: it is {value}",
                expected=expected,
                fix="Give one of these, or leave it out",
            )
    refused = RTX_REFUSALS.keys() & options.given().keys() if library.is_rtx else ()
    if refused:
        name, why, fix = next(row for key, row in RTX_REFUSALS.items() if key in refused)
        raise UsageError(
            f"{name}: {library.name} {library.version} builds here, and does not offer it",
            expected=f"tensorrt, and the GPU it builds for, because {why}",
            fix=fix,
        )
    if options.refit and options.strip_weights:
        raise UsageError(
            "stripped weights: refit was chosen as well",
            expected="one of them: refit gives each engine its weights, stripping takes them out",
            fix="Leave --strip-weights or --refit out",
        )
    if options.refit and library.version.startswith(LOSES_BIASES):
        raise UsageError(
            f"refit: {library.name} {library.version} can lose biases of engines that refit",
            expected="another release: NVIDIA says that a dropped bias counts as 0 in this one",
            fix="Leave --refit out, or install another release",
        )
    if options.compute_capabilities:
        _check_targets(library, options.compute_capabilities)


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
