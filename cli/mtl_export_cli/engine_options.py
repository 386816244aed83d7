"""What ``mtl-export trt`` lets a user choose about a build -> a record -> ``BuildOptions``.

    --workspace 2G  --optimization-level 3  --tf32  --compute-capability 8.6 (repeatable)
    --version-compatible  --hardware-compatible ampere-plus  --timing-cache FILE
    --strip-weights  --refit
    --min-shapes / --opt-shapes / --max-shapes  input_ids:1x16,task_ids:1

One profile is described by one of each shapes option; repeating them gives several, the
first of each together, then the second of each. What a library cannot do is refused by
the builder, which knows the library, before it builds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtl_export.errors import UsageError
from mtl_export_cli.options import Decorator, option

if TYPE_CHECKING:
    from mtl_export.tensorrt.options import BuildOptions
    from mtl_export.tensorrt.shapes import Profile

HARDWARE_LEVELS = ("ampere-plus", "same-compute-capability")
SHAPES = ("min_shapes", "opt_shapes", "max_shapes")
# Options whose name is not that of the record's field.
_RENAMED = {
    "workspace": "workspace_bytes",
    "compute_capability": "compute_capabilities",
    "hardware_compatible": "hardware_compatibility",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# Ten digits: with a G it is still a size that builders can hold.
_SIZE = re.compile(r"(\d{1,10})\s*([KMG]?)(?:IB)?")

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
        from mtl_export_cli.profiles import profile_from_options

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


class _Repeated(click.Option):
    """An option given any number of times; the settings file may hold one text or a list."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return super().type_cast_value(ctx, (value,) if isinstance(value, str) else value)


def size_in_bytes(text: str) -> int:
    """Return the bytes that ``2G``, ``512M``, ``64KiB`` or ``4096`` stand for.

    >>> size_in_bytes("2G")
    2147483648

    Raises:
        UsageError: It is none of these, or 0.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not size:
        raise UsageError(
            where=f"--workspace {text}",
            found="it is no size",
            expected="a whole number of bytes, or one with K, M or G (powers of 1024)",
            fix="Write for example 512M or 2G",
        )
    return size


def _workspace(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else size_in_bytes(value)


def _shapes(limit: str, text: str) -> Decorator:
    return option(
        f"--{limit}-shapes", metavar="NAME:1x16,...", cls=_Repeated, multiple=True,
        help=f"{text} shapes; inputs left out follow by dimension. Repeat for more profiles.",
    )  # fmt: skip


ENGINE: tuple[Decorator, ...] = (
    _shapes("min", "Smallest"),
    _shapes("opt", "Fastest"),
    _shapes("max", "Largest"),
    option(
        "--workspace", metavar="SIZE", callback=_workspace,
        help="Scratch memory that kernels may take: 512M, 2G.",
    ),
    option(
        "--optimization-level", type=click.IntRange(0, 5), metavar="0-5",
        help="How long to look for fast kernels.",
    ),
    option("--tf32", is_flag=True, help="Let float32 products be rounded to TF32."),
    option(
        "--compute-capability", cls=_Repeated, multiple=True, metavar="8.6",
        help="GPU to build for (TensorRT-RTX); may be repeated.",
    ),
    option(
        "--version-compatible", is_flag=True,
        help="Later TensorRT releases must run the engine (TensorRT only).",
    ),
    option(
        "--hardware-compatible", type=click.Choice(HARDWARE_LEVELS),
        help="Other GPUs must run the engine: ampere-plus, or those of the same compute"
        " capability (TensorRT only).",
    ),
    option(
        "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Keep kernel timings here from build to build (TensorRT only).",
    ),
    option(
        "--strip-weights", is_flag=True,
        help="Leave the weights out of the engine (TensorRT with a GPU only).",
    ),
    option(
        "--refit", is_flag=True,
        help="Build one task's engine, and make the others by changing its weights"
        " (TensorRT with a GPU only).",
    ),
)  # fmt: skip


def with_engine_choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the options of ``ENGINE`` as one keyword, ``choices``."""

    @functools.wraps(function)
    def with_record(*positional: Any, **values: Any) -> Any:
        given = {limit: values.pop(limit) for limit in SHAPES}
        fields = EngineChoices.__dataclass_fields__
        chosen: dict[str, Any] = {
            _RENAMED.get(name, name): values.pop(name)
            for name in [*values]
            if _RENAMED.get(name, name) in fields
        }
        choices = EngineChoices(shapes=_profiles(given), **chosen)
        return function(*positional, choices=choices, **values)

    return with_record


def _profiles(given: Mapping[str, Sequence[str]]) -> tuple[ShapeTexts, ...]:
    """Return the texts by profile.

    Raises:
        UsageError: The options were repeated, but not equally often.
    """
    counts = {len(texts) for texts in given.values() if texts}
    if len(counts) > 1:
        said = ", ".join(
            f"--{name.replace('_', '-')} {len(texts)} times" for name, texts in given.items()
        )
        raise UsageError(
            where="several profiles",
            found=said,
            expected="each shapes option left out, or given once for every profile",
            why="the first of each make the first profile, the second of each the second",
            fix="Repeat each of them as often, or leave it out",
        )
    rows = [given[limit] or (None,) * max(counts, default=0) for limit in SHAPES]
    return tuple((low, middle, high) for low, middle, high in zip(*rows, strict=True))
