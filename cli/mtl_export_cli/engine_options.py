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
from pathlib import Path
from typing import Any

import click

from mtl_export.api.engine_shapes import ShapeTexts
from mtl_export.errors import UsageError
from mtl_export.names import HARDWARE_LEVELS
from mtl_export_cli.options import Decorator, option

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
            f"--workspace {text}: it is no size",
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
    """Return ``function`` with the options of ``ENGINE`` as ``choices`` and ``shapes``."""

    @functools.wraps(function)
    def with_record(*positional: Any, **values: Any) -> Any:
        from mtl_export.tensorrt.options import BuildOptions

        given = {limit: values.pop(limit) for limit in SHAPES}
        fields = BuildOptions.__dataclass_fields__
        chosen: dict[str, Any] = {
            _RENAMED.get(name, name): values.pop(name)
            for name in [*values]
            if _RENAMED.get(name, name) in fields
        }
        choices, shapes = BuildOptions(**chosen), _profiles(given)
        return function(*positional, choices=choices, shapes=shapes, **values)

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
            f"several profiles: {said}",
            expected=(
                "each shapes option left out, or given once for every profile, because the first "
                "of each make the first profile, the second of each the second"
            ),
            fix="Repeat each of them as often, or leave it out",
        )
    rows = [given[limit] or (None,) * max(counts, default=0) for limit in SHAPES]
    return tuple((low, middle, high) for low, middle, high in zip(*rows, strict=True))
