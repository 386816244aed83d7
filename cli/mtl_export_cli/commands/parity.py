"""``mtl-export parity``: the verdict on everything that was exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api import coverage, sources
from mtl_export.api.quantised import with_max_drop
from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError
from mtl_export_cli import accuracy, options, render, reports
from mtl_export_cli.localised import print_layers, with_layers
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.parity_table import print_document, print_report
from mtl_export_cli.quantised import print_quantised

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.api.artefacts import Places
    from mtl_export.parity.presets import Preset
    from mtl_export.parity.report import Cell, ParityReport
    from mtl_export.parity.run import Artefact
    from mtl_export.parity.tolerance import Tolerance

EXIT_MISSING = 6
EPILOG = """\b
Example:
  mtl-export parity
  mtl-export parity --inputs rows.jsonl --report parity.json --report parity.html
  mtl-export parity --atol 1e-5 --rtol 0 --atol pooler_output:1e-4
  mtl-export parity --dataset labelled.jsonl --max-drop 0.5
  mtl-export parity --onnx out/onnx --require-run
"""


@click.command(
    cls=reports.ReportingCommand,
    short_help="Prove that exports still match PyTorch.",
    epilog=EPILOG,
)
@with_settings(options.SOURCE, accuracy.OPTIONS, options.TALK)
@option("--inputs", type=click.Path(path_type=Path), metavar="FILE",
        help="Rows to compare on: JSONL with task, text and, for pairs, text_pair; or arrays.npz"
        " with what the model's forward pass takes, by name, and task_ids.")  # fmt: skip
@option("--atol", multiple=True, metavar="[OUTPUT:]NUMBER",
        help="Absolute error allowed, of all outputs or of one; needs --rtol.")  # fmt: skip
@option("--rtol", multiple=True, metavar="[OUTPUT:]NUMBER",
        help="Relative error allowed, likewise; needs --atol.")  # fmt: skip
@option("--quick", is_flag=True,
        help="Only a batch of each task and one of all; not single rows, odd, long or left-padded"
        " batches, nor every layer.")  # fmt: skip
@option("--full", is_flag=True,
        help="Also lengths and batches around powers of two, and more seeds.")  # fmt: skip
@option("--merged", type=click.Path(path_type=Path), metavar="DIR", help="Merged folders.")
@option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="ONNX graphs.")
@option("--engines", type=click.Path(path_type=Path), metavar="DIR", help="Engines.")
@option("--report", multiple=True, is_eager=True, type=click.Path(path_type=Path), metavar="FILE",
        help="Also write the report there, as its suffix says: .json, .xml (JUnit), .sarif,"
        " .md or .html; may be repeated.")  # fmt: skip
@option("--golden", is_flag=True,
        help="Save inputs and outputs beside what passed, for mtl-export verify.")  # fmt: skip
@option("--localise/--no-localise", default=True,
        help="When something failed, say in which layer its error begins, and why if that is"
        " known.")  # fmt: skip
@option("--bisect", is_flag=True,
        help="When a graph in fp16 or bf16 failed, also say which layers must compute in"
        " fp32.")  # fmt: skip
@option("--require-run", is_flag=True,
        help=options.REQUIRE_RUN_HELP)  # fmt: skip
@options.THREADS
def command(
    settings: Settings,
    *,
    inputs: Path | None,
    atol: tuple[str, ...],
    rtol: tuple[str, ...],
    dataset: str | None,
    max_drop: float | None,
    score: dict[str, str],
    quick: bool,
    full: bool,
    merged: Path | None,
    onnx: Path | None,
    engines: Path | None,
    report: tuple[Path, ...],
    golden: bool,
    localise: bool,
    bisect: bool,
    require_run: bool,
    threads: int,
) -> int:
    """Prove that exports still match PyTorch.

    Compares merged folders, graphs and engines under the output folder with the unmerged
    PyTorch model in float64: every task, mixed batches, and shapes that were not traced; of
    language models also every step from the cache and the tokens they generate.
    An error passes when it is at most 8 times what the arithmetic of the artefact's dtype
    itself costs the model (or within --atol and --rtol) and no decision changes. Quantised
    graphs are held to that without their Q/DQ; with them, to what calibrate counted: it may be
    --max-drop, else what calibrate itself was allowed.

    --quick compares a batch of each task and one of all tasks mixed (of language models also
    the steps and tokens that follow), and asks for ids that no task has, other tasks' tensors,
    stored tensors and permuted rows. The default has that, single rows, small, odd, long and
    left-padded batches, rows one by one and beside padding, every layer, and zeroed adapters.
    --full has that, one and two tokens, both sides of powers of two, and more seeds. What is
    left out is listed as not-run.

    With --dataset the scores of the reference and of every artefact on labelled rows are
    compared too: a drop counts by its interval (paired bootstrap), so that noise neither passes
    nor fails a build. Exit code 3 when anything fails, 4 when a task's score drops by more than
    --max-drop, 2 when the rows cannot tell, 6 when nothing could be run. --score, and --max-drop
    where nothing is quantised, are refused on the command line without --dataset; those of the
    settings file and of the environment then wait for a run that has it.

    A folder that mtl-export wrote and whose name is no task's fails: it was renamed or left
    behind, and nobody compares it. With --require-run also what could not be run for want of a
    runtime or device is exit code 6, and a task without an export (its own, or one that serves
    all tasks) where others have one. What a preset leaves out does not count.
    """
    from mtl_export.api.artefacts import Places
    from mtl_export.parity.presets import preset_of
    from mtl_export.parity.tolerance import Tolerance

    with reports.errors_reported(report, settings):
        preset = preset_of(quick, full)
        tolerance = Tolerance.from_texts(atol, rtol)
        bound = sources.open_bound(settings, targets=())
        places = Places(
            _existing("--merged", merged) or settings.output_dir / "merged",
            _existing("--onnx", onnx) or settings.output_dir / "onnx",
            _existing("--engines", engines) or settings.output_dir / "engines",
            settings.output_dir,
        )
        gate = accuracy.gate_of(dataset, max_drop, score)
        request = _Request(
            places, inputs, tolerance, gate, preset, threads, golden, localise or bisect, bisect
        )
        artefacts, not_there = _found(bound, request, max_drop)
        result = _compare(bound, request, settings, artefacts, not_there)
        code, error = accuracy.outcome(result)
        if code == 0 and require_run:
            tasks, named = bound.adapters.tasks, [merged, onnx, engines]
            lacking = coverage.lacking_exports(artefacts, places, tasks, named)
            error = coverage.refuse_not_run(result, lacking)
            if error is not None:
                code, result = EXIT_MISSING, replace(result, error=error.as_dict())
        reports.write_reports(report, result)
    if settings.json:
        print_document(result, code, error)
        return code
    print_report(result)
    print_layers(result)
    print_quantised(result)
    accuracy.print_accuracy(result)
    if error is not None:
        raise error
    return code


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be compared, and how.

    Attributes:
        places: Where the artefacts lie.
        inputs: The user's rows, or None.
        tolerance: What is allowed.
        gate: What is asked of accuracy; None without labelled rows.
        preset: How much is compared.
        threads: Of the runtimes.
        golden: Save golden vectors.
        localise: Say in which layer an error begins.
        bisect: Say which layers must compute in float32.
    """

    places: Places
    inputs: Path | None
    tolerance: Tolerance
    gate: accuracy.Gate | None
    preset: Preset
    threads: int
    golden: bool
    localise: bool
    bisect: bool


def _existing(name: str, folder: Path | None) -> Path | None:
    """Return a folder that the user named.

    Raises:
        UsageError: There is none of that name.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(
            where=f"{name} {folder}",
            found="no such folder",
            expected="a folder that mtl-export wrote",
            why="what is not found is not compared",
            fix=f"Correct {name}, or leave it out",
        )
    return folder


def _found(
    bound: BoundModel, request: _Request, max_drop: float | None
) -> tuple[list[Artefact], list[Cell]]:
    """Return what was exported, and a cell for each export that cannot be compared.

    Raises:
        UsageError: There is nothing to compare, or an option judges none of it.
    """
    from mtl_export.api.artefacts import find_artefacts

    places = request.places
    artefacts, not_there = find_artefacts(bound, places, threads=request.threads)
    accuracy.refuse_alone(artefacts)
    not_there += coverage.unclaimed_cells(places, bound.adapters.tasks)
    if not artefacts:
        raise UsageError(
            where="parity",
            found=f"nothing under {places.merged}, {places.onnx} or {places.engines}"
            + "".join(f"; {cell.reason}" for cell in not_there if cell.verdict == "failed"),
            expected="at least one exported model",
            why="a check that compares nothing must not pass",
            fix="Run mtl-export merge --all-tasks or mtl-export onnx --all-tasks first",
        )
    return artefacts if max_drop is None else with_max_drop(artefacts, max_drop), not_there


def _compare(
    bound: BoundModel,
    request: _Request,
    settings: Settings,
    artefacts: list[Artefact],
    not_there: list[Cell],
) -> ParityReport:
    """Return the report on everything that was exported."""
    from mtl_export.api.parity_inputs import base_of, cases_of, oracle_of
    from mtl_export.parity.presets import choose
    from mtl_export.parity.run import run_parity, step_count
    from mtl_export.runtime.runners.pytorch import use_threads

    use_threads(request.threads)
    cases, left_out = choose(cases_of(bound, request.inputs), request.preset)
    rows = accuracy.open_gate(bound, request.gate) if request.gate else None
    talk = render.Talk.from_settings(settings)
    with talk.steps(step_count(artefacts)) as steps:
        result = run_parity(
            bound,
            artefacts,
            cases,
            tolerance=request.tolerance,
            oracle=oracle_of(bound),
            not_there=not_there,
            left_out=left_out,
            base=base_of(bound),
            threads=request.threads,
            progress=steps.begin,
        )
    if request.localise:
        result = with_layers(
            result, bound, artefacts, cases,
            oracle=oracle_of(bound), threads=request.threads, bisect=request.bisect, talk=talk,
        )  # fmt: skip
    if rows is not None and request.gate is not None:
        result = accuracy.with_accuracy(
            result, bound, artefacts, rows,
            max_drop=request.gate.max_drop, oracle=oracle_of(bound), talk=talk,
        )  # fmt: skip
    if request.golden:
        from mtl_export.api.golden import save_golden

        for path in save_golden(bound, artefacts, cases, result, request.tolerance):
            talk.note(f"golden vectors: {path}")
    return reports.with_evidence(result, artefacts, cases, request.inputs)
