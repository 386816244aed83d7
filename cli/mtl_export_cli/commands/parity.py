"""``mtl-export parity``: the verdict on everything that was exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.errors import BackendMissingError, UsageError
from mtl_export_cli import options, render, reports, sources
from mtl_export_cli.options import Settings, option, with_settings

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array
    from mtl_export.parity.cases import Case
    from mtl_export.parity.report import Cell, ParityReport
    from mtl_export.parity.tolerance import Tolerance
    from mtl_export.runtime.runner import Runner
    from mtl_export_cli.artefacts import Places

EXIT_FAILED = 3
# The largest array of a language model's logits that is compared.
LARGEST_LOGITS_BYTES = 1 << 28
EPILOG = """\b
Example:
  mtl-export parity
  mtl-export parity --inputs rows.jsonl --report parity.json --report parity.html
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
@option("--report", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
        help="Also write the report there, as its suffix says: .json, .xml (JUnit), .sarif,"
        " .md or .html; may be repeated.")  # fmt: skip
@option("--golden", is_flag=True,
        help="Save inputs and outputs beside what passed, for mtl-export verify.")  # fmt: skip
@option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0: all cores.")
def command(
    settings: Settings,
    inputs: Path | None,
    atol: float | None,
    rtol: float | None,
    merged: Path | None,
    onnx: Path | None,
    engines: Path | None,
    report: tuple[Path, ...],
    golden: bool,
    threads: int,
) -> int:
    """Prove that exports still match PyTorch.

    Compares merged folders, graphs and engines under the output folder with the unmerged
    PyTorch model in float64: every task, mixed batches, and shapes that were not traced; of
    language models also every step from the cache and the tokens they generate.
    An error passes when it is at most 8 times what the arithmetic of the artefact's dtype
    itself costs the model (or within --atol and --rtol) and no decision changes. Exit code 3 when
    anything fails, 6 when nothing could be run.
    """
    from mtl_export.parity.tolerance import Tolerance
    from mtl_export_cli.artefacts import Places

    reports.check_suffixes(report)
    with reports.errors_reported(report):
        tolerance = Tolerance(atol=atol, rtol=rtol)
        bound = sources.open_bound(settings)
        places = Places(
            _existing("--merged", merged) or settings.output_dir / "merged",
            _existing("--onnx", onnx) or settings.output_dir / "onnx",
            _existing("--engines", engines) or settings.output_dir / "engines",
        )
        request = _Request(places, inputs, tolerance, threads, golden)
        result = _compare(bound, request, settings)
        reports.write_reports(report, result)
    _print(result, settings)
    if result.verdict == "not-run":
        raise BackendMissingError(
            where="parity",
            found="artefacts are there but none could be run",
            expected="at least one comparison",
            fix="See mtl-export doctor for what is missing",
        )
    return EXIT_FAILED if result.verdict == "failed" else 0


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be compared, and how.

    Attributes:
        places: Where the artefacts lie.
        inputs: The user's rows, or None.
        tolerance: What is allowed.
        threads: Of the runtimes.
        golden: Save golden vectors.
    """

    places: Places
    inputs: Path | None
    tolerance: Tolerance
    threads: int
    golden: bool


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


def _compare(bound: BoundModel, request: _Request, settings: Settings) -> ParityReport:
    """Return the report on everything that was exported."""
    from mtl_export.parity.run import run_parity, step_count
    from mtl_export.runtime.pytorch import use_threads
    from mtl_export_cli.artefacts import find_artefacts

    places = request.places
    artefacts, not_there = find_artefacts(bound, places, threads=request.threads)
    if not artefacts:
        raise UsageError(
            where="parity",
            found=f"nothing under {places.merged}, {places.onnx} or {places.engines}",
            expected="at least one exported model",
            why="a check that compares nothing must not pass",
            fix="Run mtl-export merge --all-tasks or mtl-export onnx --all-tasks first",
        )
    use_threads(request.threads)
    cases = _cases(bound, request.inputs)
    talk = render.Talk.from_settings(settings)
    with talk.steps(step_count(artefacts)) as steps:
        result = run_parity(
            bound,
            artefacts,
            cases,
            tolerance=request.tolerance,
            oracle=_oracle(bound),
            not_there=not_there,
            threads=request.threads,
            progress=steps.begin,
        )
    if request.golden:
        from mtl_export_cli.golden import save_golden

        for path in save_golden(bound, artefacts, cases, result, request.tolerance):
            talk.note(f"golden vectors: {path}")
    return reports.with_evidence(result, artefacts, cases, request.inputs)


def _oracle(bound: BoundModel) -> Callable[[str], Runner]:
    """Return what makes the oracle in a dtype."""
    if is_causal_lm(bound.adapters.model_class):
        from mtl_export.runtime.torch_language import OracleLanguageRunner

        return lambda dtype: OracleLanguageRunner(bound, dtype)
    if is_seq2seq(bound.adapters.model_class, bound.base.config):
        from mtl_export.runtime.torch_seq2seq import OracleSeq2SeqRunner

        return lambda dtype: OracleSeq2SeqRunner(bound, dtype)
    from mtl_export.runtime.pytorch import OracleRunner

    return lambda dtype: OracleRunner(bound, dtype)


def _cases(bound: BoundModel, inputs: Path | None) -> list[Case]:
    """Return the batches to compare on: the user's rows, or seeded ones."""
    from mtl_export.checkpoint.model_inputs import PIXEL_VALUES, image_shape, longest_sequence
    from mtl_export.parity.cases import LONG_SEQUENCE, build_cases, seeded_rows
    from mtl_export.parity.generation import STEPS, step_cases
    from mtl_export.parity.seq2seq import decoder_cases

    config = bound.base.config
    image = image_shape(config)
    vocabulary = int(config.get("vocab_size") or 1)
    longest = longest_sequence(config, unlimited=512)
    token_types = int(config.get("type_vocab_size") or 1)
    task_count = len(bound.adapters.tasks)
    is_lm = is_causal_lm(bound.adapters.model_class)
    if is_lm:
        # A logit for each word of the vocabulary at each token, in float64, for every task.
        room = LARGEST_LOGITS_BYTES // (8 * vocabulary * task_count)
        longest = min(longest, max(room, LONG_SEQUENCE + STEPS))
    if inputs is None:
        names = [PIXEL_VALUES] if image else ["input_ids", "attention_mask"]
        names += ["token_type_ids"] if config.get("type_vocab_size") else []
        rows = seeded_rows(
            task_count=task_count,
            vocabulary=vocabulary,
            names=names,
            token_types=token_types,
            image=image,
        )
    elif image:
        raise UsageError(
            where=f"--inputs {inputs}",
            found=f"rows of text for a {bound.adapters.model_class}",
            expected="no --inputs: this model takes images",
            why="images are compared on seeded pixel values",
            fix="Leave out --inputs",
        )
    else:
        rows = _tokenised(bound, inputs, longest)
    cases = build_cases(
        rows,
        task_count=task_count,
        vocabulary=vocabulary,
        longest=longest,
        token_types=token_types,
    )
    if is_lm:
        cases += step_cases(cases, vocabulary=vocabulary, longest=longest)
    if is_seq2seq(bound.adapters.model_class, config):
        cases = decoder_cases(cases, bound.adapters.model_class, config, vocabulary=vocabulary)
    return cases


def _tokenised(bound: BoundModel, inputs: Path, longest: int) -> dict[str, Array]:
    from mtl_export_calibration.data import load_rows, tokenize

    return tokenize(load_rows(inputs), bound.base.folder, bound.adapters.tasks, max_length=longest)


def _print(result: ParityReport, settings: Settings) -> None:
    if settings.json:
        render.print_json({"ok": result.verdict == "passed", **result.as_dict()})
        return
    for cell in result.cells:
        if cell.verdict == "failed":
            render.print_line(
                f"FAILED {cell.artefact}, task {cell.task}, {cell.case}: {cell.reason}"
            )
    not_run: dict[tuple[str, str], list[str]] = {}
    for cell in result.cells:
        if cell.verdict == "not-run":
            not_run.setdefault((cell.artefact, cell.reason), []).append(cell.task)
    for (artefact, reason), tasks in not_run.items():
        of_tasks = "" if tasks == ["*"] else f" of {', '.join(tasks)}"
        render.print_line(f"not run: {artefact}{of_tasks}: {reason}")
    counts = ", ".join(f"{result.count(v)} {v}" for v in ("passed", "failed", "not-run"))
    title = f"parity {result.verdict}: {counts}; rule: {result.tolerance}"
    render.print_table(*_table(result), title=title)


def _table(result: ParityReport) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: task by artefact, the worst cell of each speaking for it."""
    from mtl_export.parity.report import worst
    from mtl_export_cli.artefacts import KINDS

    found = {cell.artefact for cell in result.cells}
    artefacts = [kind for kind in KINDS if kind in found]
    rows = []
    tasks = list(next(iter(result.noise_floors.values())))
    for task in tasks:
        floors = [f"{dtype} {by_task[task]:.1e}" for dtype, by_task in result.noise_floors.items()]
        row = [task, ", ".join(floors)]
        for artefact in artefacts:
            # What holds for all tasks (bad ids, an engine that cannot run) counts for each.
            own = [
                cell
                for cell in result.cells
                if cell.artefact == artefact and cell.task in {task, "*"}
            ]
            row.append(_text(worst(own)) if own else "")
        rows.append(row)
    return ["task", "noise floor", *artefacts], rows


def _text(cell: Cell) -> str:
    error = "" if cell.max_abs_error is None else f"{cell.max_abs_error:.1e} "
    return f"{error}{cell.verdict}"
