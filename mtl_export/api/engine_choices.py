"""What a user chooses about a build of engines -> ``BuildOptions`` for each graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_export.tensorrt.options import BuildOptions
    from mtl_export.tensorrt.shapes import Profile

HARDWARE_LEVELS = ("ampere-plus", "same-compute-capability")
# One profile as typed: smallest, best, largest; None for what was left out.
ShapeTexts = tuple[str | None, str | None, str | None]


@dataclass(frozen=True, slots=True)
class EngineChoices:
    """What the user asked of the builder.

    Attributes:
        workspace_bytes: Scratch memory that kernels may ask for; None for the default.
        optimization_level: 0 to 5; None for the default.
        tf32: Whether float32 products may be rounded to TF32.
        compute_capabilities: GPUs to build for, such as ``8.6``.
        version_compatible: Whether later releases must be able to run the engine.
        hardware_compatibility: One of ``HARDWARE_LEVELS``; None for the GPU at hand.
        timing_cache: File that keeps kernel timings from build to build.
        strip_weights: Leave the weights out of the engine.
        refit: Build one engine, and give it each task's weights.
        shapes: The profiles as typed; none for the model's default.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    timing_cache: Path | None = None
    strip_weights: bool = False
    refit: bool = False
    shapes: tuple[ShapeTexts, ...] = ()

    def build_options(self, onnx_path: Path, *, beside: Sequence[Path] = ()) -> BuildOptions:
        """Return the choices for the graph at ``onnx_path``, its profiles resolved.

        Args:
            onnx_path: The graph.
            beside: The other graphs of the same model (``decode`` for ``prefill``), whose
                inputs the shapes may name as well.

        Raises:
            UsageError: A shape is malformed or does not fit.
        """
        from mtl_export.api.engine_shapes import profile_from_options

        profiles = (
            profile_from_options(onnx_path, *texts, beside=beside)
            for texts in self.shapes or ((None, None, None),)
        )
        return self._options(tuple(profile for profile in profiles if profile.shapes))

    def refuse_impossible(self, library_name: str) -> None:
        """Refuse what the library of that name cannot do, before there is a graph.

        Raises:
            UsageError: It would ignore, round or fail at one of the choices.
        """
        from mtl_export.tensorrt.api import load_library
        from mtl_export.tensorrt.options import check_choices

        check_choices(load_library(library_name), self._options(()))

    def _options(self, profiles: tuple[Profile, ...]) -> BuildOptions:
        from mtl_export.tensorrt.options import BuildOptions

        return BuildOptions(
            profiles=profiles,
            workspace_bytes=self.workspace_bytes,
            optimization_level=self.optimization_level,
            tf32=self.tf32,
            compute_capabilities=self.compute_capabilities,
            version_compatible=self.version_compatible,
            hardware_compatibility=self.hardware_compatibility,
            timing_cache=self.timing_cache,
            strip_weights=self.strip_weights,
            refit=self.refit,
        )

    def recipe(self) -> dict[str, Any]:
        """Return what was chosen, shapes apart, as JSON's types: part of an engine's recipe.

        The timing cache is left out: it shortens a build and asks for no other engine.
        """
        chosen = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in ("shapes", "timing_cache")
        }
        return {name: value for name, value in chosen.items() if value not in (None, False, [])}
