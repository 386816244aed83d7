"""``mtl-export calibrate``: exported graphs, quantised with ranges that respect tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from mtl_export.api.settings import Settings
from mtl_export.names import LAYOUTS, QUANTISED_DTYPES
from mtl_export_calibration.front_door import (
    COMBINATIONS,
    DELTAS,
    ENGINES,
    METHODS,
    Calibration,
)
from mtl_export_calibration.targets import BOTH
from mtl_export_cli import options, render
from mtl_export_cli.calibrated import print_outcomes
from mtl_export_cli.options import option, with_settings

LAYOUT = option(
    "--layout", type=click.Choice((*LAYOUTS, BOTH)), default=BOTH, show_default=True,
    help=options.LAYOUT_HELP,
)  # fmt: skip
EPILOG = """\b
Example:
  mtl-export calibrate
  mtl-export calibrate --quantize fp8 --layout per-task
  mtl-export calibrate --data rows.jsonl --judge labelled.jsonl --exclude 'layer\\.0\\.'
\b
Data: rows.jsonl, a folder of them, arrays.npz, or module:function (file.py:function).
"""


def _weights(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """Return ``NAME=NUMBER`` options as a mapping."""
    weights = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER") from None
        if not 0.0 <= weights[name] < math.inf:
            raise click.BadParameter(f"{value!r}: a weight is finite and not negative")
    return weights


@click.command(short_help="Quantise exported graphs, by calibration data.", epilog=EPILOG)
@with_settings(options.SOURCE, [LAYOUT], [options.OUTPUT[0], options.OUTPUT[2]], options.TALK)
@option("--data", metavar="DATA", help="Rows to take ranges from; each task needs some.")
@option("--judge", metavar="DATA",
        help="Rows to count accuracy on, best labelled; by default those of --data.")  # fmt: skip
@option("--samples", type=click.IntRange(min=1), default=128, show_default=True,
        help="Rows of each task to take ranges from.")  # fmt: skip
@option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
        help="Decides which rows.")  # fmt: skip
@option("--quantize", type=click.Choice(QUANTISED_DTYPES), default="int8", show_default=True,
        help=options.QUANTIZE_HELP)  # fmt: skip
@option("--method", type=click.Choice(METHODS),
        help="How ranges are chosen; by default percentile for int8, max for fp8.")  # fmt: skip
@option("--engine", type=click.Choice(ENGINES), default=ENGINES[0], show_default=True,
        help="Whose calibrators choose ranges: ours, or NVIDIA's; modelopt: [quant].")  # fmt: skip
@option("--combine", type=click.Choice(COMBINATIONS),
        help="How to join tasks' ranges; by default union, merged graphs: per-task.")  # fmt: skip
@option("--weight", multiple=True, metavar="TASK=NUMBER", callback=_weights,
        help="A task's weight for --combine weighted; 1 unless given.")  # fmt: skip
@option("--exclude", multiple=True, metavar="REGEX", help="Layers to leave unquantised.")
@option("--deltas", type=click.Choice(DELTAS), default="apart", show_default=True,
        help="Layers of merged graphs whose steps would swallow the task's change.")  # fmt: skip
@options.MAX_DROP
@option("--max-cut", type=options.FiniteRange(min=0.0), default=3.0, show_default=True,
        help="Times as often as is usual that a task's values may lie beyond a range.")  # fmt: skip
@option("--max-excluded", type=options.FiniteRange(0.0, 1.0), default=0.5, show_default=True,
        help="Largest share of layers that may be left unquantised to get there.")  # fmt: skip
@option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="ONNX graphs.")
@options.THREADS
def command(
    settings: Settings,
    *,
    layout: str,
    data: str | None,
    judge: str | None,
    samples: int,
    seed: int,
    quantize: str,
    method: str | None,
    engine: str,
    combine: str | None,
    weight: dict[str, float],
    exclude: tuple[str, ...],
    deltas: str,
    max_drop: float | None,
    max_cut: float,
    max_excluded: float,
    onnx: Path | None,
    threads: int,
) -> int:
    """Quantise exported graphs, by calibration data.

    Takes ranges of every activation on every task, writes explicit Q/DQ around the base's
    products, and counts what that costs each task. Where the worst task loses more than
    --max-drop, the layers that cost most are left unquantised. Graphs that pass go to
    onnx-int8/ (onnx-fp8/, onnx-int4/) under the output folder, or to --output; if a task
    still loses too much, or the ranges cut its values (--max-cut), nothing is written and
    the exit code is 4. The single graph and those of every task are taken from onnx/ under
    the output folder, and exported there first where they are missing; from --onnx as they are.
    """
    from mtl_export_calibration.formats import format_named
    from mtl_export_calibration.measure import Options
    from mtl_export_calibration.run import CalibrationRequest

    number = format_named(quantize)
    chosen = Options(
        number=number,
        method=method or number.method,
        combine=combine,
        weights=weight,
        exclude=exclude,
        deltas=deltas,
        max_drop=number.max_drop if max_drop is None else max_drop,
        max_cut=max_cut,
        max_excluded=max_excluded,
        threads=threads,
        engine=engine,
    )
    with render.Messages.from_settings(settings).steps() as steps:
        request = CalibrationRequest(
            settings, chosen, data or "", judge or data or "", samples, seed, steps
        )
        found = Calibration(tuple(request.quantised(layout, onnx)))
    if settings.json:
        render.print_json(found.as_dict())
    else:
        print_outcomes(found.graphs, chosen)
    return found.exit_code
