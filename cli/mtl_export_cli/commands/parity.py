"""``mtl-export parity``: the verdict on everything that was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.errors import BackendMissingError, UsageError
from mtl_export_cli import options, render, sources
from mtl_export_cli.options import Settings, option, with_settings

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array
    from mtl_export.parity.report import ParityReport

EXIT_FAILED = 3
EPILOG = """\b
Example:
  mtl-export parity
  mtl-export parity --inputs rows.jsonl --report parity.json
  mtl-export parity --atol 1e-5 --rtol 0
"""


@click.command(short_help="Prove that exports still match PyTorch.", epilog=EPILOG)
@with_settings(options.SOURCE, options.TALK)
@option("--inputs", type=click.Path(path_type=Path), metavar="FILE",
        help="Rows to compare on: JSONL with task, text and, for pairs, text_pair.")  # fmt: skip
@option("--atol", type=float, help="Absolute error allowed; needs --rtol.")
@option("--rtol", type=float, help="Relative error allowed; needs --atol.")
@option("--merged", type=click.Path(path_type=Path), metavar="DIR", help="Merged folders.")
@option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="ONNX graphs.")
@option("--engines", type=click.Path(path_type=Path), metavar="DIR", help="Engines.")
@option("--report", type=click.Path(path_type=Path), metavar="FILE",
        help="Also write the whole report there, as JSON.")  # fmt: skip
@option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0: all cores.")
def command(
    settings: Settings,
    inputs: Path | None,
    atol: float | None,
    rtol: float | None,
    merged: Path | None,
    onnx: Path | None,
    engines: Path | None,
    report: Path | None,
    threads: int,
) -> int:
    """Prove that exports still match PyTorch.

    Compares merged folders, graphs and engines under the output folder with the unmerged
    PyTorch model in float64: every task, mixed batches, and shapes that were not traced.
    An error passes when it is at most 8 times what float32 arithmetic itself costs the
    model (or within --atol and --rtol) and no decision changes. Exit code 3 when
    anything fails, 6 when nothing could be run.
    """
    from mtl_export.parity.run import run_parity
    from mtl_export.parity.tolerance import Tolerance
    from mtl_export.runtime.pytorch import OracleRunner, use_threads
    from mtl_export_cli.artefacts import Places, find_artefacts

    tolerance = Tolerance(atol=atol, rtol=rtol)
    bound = sources.open_bound(settings)
    places = Places(
        merged or settings.output_dir / "merged",
        onnx or settings.output_dir / "onnx",
        engines or settings.output_dir / "engines",
    )
    artefacts, not_there = find_artefacts(bound, places, threads=threads)
    if not artefacts:
        raise UsageError(
            where="parity",
            found=f"nothing under {places.merged}, {places.onnx} or {places.engines}",
            expected="at least one exported model",
            why="a check that compares nothing must not pass",
            fix="Run mtl-export merge --all-tasks or mtl-export onnx --all-tasks first",
        )
    use_threads(threads)
    talk = render.Talk.from_settings(settings)
    with talk.steps(0) as steps:
        result = run_parity(
            bound,
            artefacts,
            _cases(bound, inputs),
            tolerance=tolerance,
            oracle=lambda dtype: OracleRunner(bound, dtype),
            not_there=not_there,
            progress=steps.at,
        )
    if report is not None:
        _write_report(report, result)
    _print(result, settings)
    if result.verdict == "not-run":
        raise BackendMissingError(
            where="parity",
            found="artefacts are there but none could be run",
            expected="at least one comparison",
            fix="See mtl-export doctor for what is missing",
        )
    return EXIT_FAILED if result.verdict == "failed" else 0
