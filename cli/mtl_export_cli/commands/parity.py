"""``mtl-export parity``: the verdict on everything that was exported."""

from __future__ import annotations

from pathlib import Path

import click

from mtl_export.api.parity import ParityRequest, judge_exports
from mtl_export.api.settings import Settings
from mtl_export_cli import accuracy, options, render, reports
from mtl_export_cli.localised import print_layers
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.parity_table import print_report
from mtl_export_cli.quantised import print_quantised

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
    from mtl_export.parity.cases import preset_of
    from mtl_export.parity.reports.files import write_reports
    from mtl_export.parity.tolerance import Tolerance

    with reports.errors_reported(report, settings):
        request = ParityRequest(
            preset=preset_of(quick, full),
            merged=merged,
            onnx=onnx,
            engines=engines,
            inputs=inputs,
            tolerance=Tolerance.from_texts(atol, rtol),
            dataset=dataset,
            max_drop=max_drop,
            scores=score,
            threads=threads,
            golden=golden,
            localise=localise,
            bisect=bisect,
            require_run=require_run,
        )
        with render.Messages.from_settings(settings).steps() as steps:
            result = judge_exports(settings, request, steps)
        write_reports(report, result.report)
    if settings.json:
        render.print_json(result.as_dict())
        return result.exit_code
    print_report(result.report)
    print_layers(result.report)
    print_quantised(result.report)
    accuracy.print_accuracy(result.report)
    if result.error is not None:
        raise result.error
    return result.exit_code
