"""Compare every artefact with the oracle, on every case, for every task.

reference   the family's PyTorch oracle, unmerged, float64
candidate   a merged folder in PyTorch, a merged or routed graph, an engine
pass        the error is within the tolerance AND the decisions agree AND nothing
            is missing, misshapen, newly NaN, or answered by a head that should not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

from mtl_export.adapters.binding import BoundModel
from mtl_export.errors import BackendMissingError, MtlExportError
from mtl_export.graph.origins import EditedGraph
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import LAYERS, ONE_ROW, PADDING_ONLY, ZEROED, Case
from mtl_export.parity.checks.edited_graph import unjudged_cells, views_of
from mtl_export.parity.checks.generation import token_cells
from mtl_export.parity.checks.logits import compare_case
from mtl_export.parity.checks.metadata import beside_cells
from mtl_export.parity.checks.quantised import plain_cells, quantised_cells
from mtl_export.parity.checks.rows import padding_only_cells, routing_cells, row_cells
from mtl_export.parity.checks.stored_tensors import stored_cell, table_cell
from mtl_export.parity.checks.task_tensors import PROBED, weight_cells
from mtl_export.parity.judged import Judged
from mtl_export.parity.reference import (
    ExtraChecks,
    Floors,
    noise_floors,
    padding_of,
    references_of,
    tokens_of_oracle,
    with_zeroed,
)
from mtl_export.parity.report import WHOLE, Cell, ParityReport
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.base import Runner
from mtl_export.version import VERSION

# Checks of what must hold whatever the numbers are, run for each kind of answer.
CONTRACT: tuple[Callable[[Judged], list[Cell]], ...] = (routing_cells, weight_cells, row_cells)


@dataclass(frozen=True)
class RunOptions:
    """How much is compared, and how.

    Attributes:
        left_out: Why cases and checks are not run, by name; from ``cases.choose``.
        base: The oracle of the model without adapters, or why there is none, from
            ``reference.without_adapters``; None leaves that check out without a word.
        threads: Of ONNX Runtime where the tensors of a graph are looked into; 0 lets it decide.
        progress: Called with the name of each step as it begins; ``step_count`` in all.
    """

    left_out: Mapping[str, str] = field(default_factory=dict)
    base: Callable[[str], Runner] | str | None = None
    threads: int = 0
    progress: Callable[[str], None] = lambda step: None


def step_count(artefacts: Sequence[Artefact]) -> int:
    """Return how many steps ``run_parity`` takes."""
    return 1 + len({artefact.dtype for artefact in artefacts}) + len(artefacts)


def run_parity(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    cases: Sequence[Case],
    *,
    tolerance: Tolerance,
    oracle: Callable[[str], Runner],
    options: RunOptions | None = None,
) -> ParityReport:
    """Return the verdict on ``artefacts``.

    Args:
        bound: The checkpoint and its base.
        artefacts: What ships.
        cases: From ``cases.build_cases``.
        tolerance: What is allowed.
        oracle: Returns the oracle in ``fp64``, the reference, or in a candidate's dtype,
            for its noise floor.
        options: How much is compared, and how; None: all but the check of zeroed adapters.

    Raises:
        ParityError: The oracle itself answers with NaN or Inf, so nothing can be compared; no row
            reaches a layer that tasks adapt; or noise would let any answer pass.
    """
    options = options or RunOptions()
    options.progress("oracle fp64")
    tasks, left_out = bound.adapters.tasks, options.left_out
    embeddings = list(dict.fromkeys(artefact.embedding for artefact in artefacts))
    with oracle("fp64") as reference:
        exact = references_of(reference, cases, embeddings, tasks)
        generated = tokens_of_oracle(reference, cases)
        padding = None if PADDING_ONLY in left_out else padding_of(reference, exact)
    # After the reference is closed: two models in float64 need not fit beside each other.
    extra = with_zeroed(ExtraChecks(left_out, padding, generated), exact, options.base)
    tolerance.refuse_unknown({one.subject.output for one in exact})
    floors: dict[str, Floors] = {}
    for dtype in sorted({artefact.dtype for artefact in artefacts}):
        options.progress(f"oracle {dtype}, for the noise floor")
        floors[dtype] = noise_floors(tasks, exact, oracle(dtype), dtype, tolerance)
    cells: list[Cell] = []
    for artefact in artefacts:
        task = artefact.task
        options.progress(f"{artefact.name} {task.name if task else ''}".rstrip())
        own = [
            one
            for one in exact
            if one.subject.embedding == artefact.embedding
            and (task is None or one.subject.serves(task))
        ]
        judged = Judged(
            bound, artefact, own, floors[artefact.dtype], tolerance, options.threads, extra
        )
        cells += _judge(judged if task is None else judged.of_tasks([task.index]))
    return _report(bound, artefacts, cells, tolerance, floors)


def _report(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    cells: Sequence[Cell],
    tolerance: Tolerance,
    floors: Mapping[str, Floors],
) -> ParityReport:
    tasks = bound.adapters.tasks
    return ParityReport(
        cells=tuple(cells),
        tolerance=tolerance.describe(),
        noise_floors={
            dtype: {
                task.name: max(floor for one, floor in by_output.items() if one.serves(task))
                for task in tasks
            }
            for dtype, by_output in floors.items()
        },
        sources={
            "base_sha256": bound.base.sha256,
            "checkpoint_sha256": bound.adapters.checkpoint_sha256,
        },
        versions=versions(),
        quantised=tuple(
            record
            for artefact in artefacts
            if artefact.quantised is not None
            for task in tasks
            if (record := artefact.quantised.recorded.get(task.name)) is not None
        ),
    )


def _judge(judged: Judged) -> list[Cell]:
    """Return the cells of one artefact."""
    artefact = judged.artefact
    if wrong := artefact.wrong_files(judged.bound):
        return [artefact.cell().judged(WHOLE, wrong)]
    cells: list[Cell] = []
    try:
        if artefact.edited is not None:
            return _judge_edited(judged, artefact.edited)
        if not judged.is_alone:
            cells += beside_cells(judged)
        with artefact.runner:
            if artefact.quantised is not None:
                return cells + _judge_quantised(judged)
            for _, group in groupby(judged.exact, key=lambda one: id(one.case)):
                references = list(group)
                outputs = artefact.infer(references[0].case.inputs)
                cells += compare_case(judged, references, outputs)
            cells += _contract(judged)
            cells += _left_out(judged)
            cells += token_cells(judged)
    except BackendMissingError as error:
        cells.append(judged.not_run(WHOLE, str(error)))
    except MtlExportError as error:
        cells.append(artefact.cell().judged(WHOLE, str(error)))
    return cells


def _judge_edited(judged: Judged, edited: EditedGraph) -> list[Cell]:
    """Return the cells of a graph whose tasks were edited."""
    artefact, adapters = judged.artefact, judged.bound.adapters
    cells = unjudged_cells(artefact, edited, adapters)
    for view in views_of(edited, adapters):
        found = _judge(view.judged(judged)) + view.file_cells(artefact, adapters)
        cells += view.named(found)
    return cells + beside_cells(judged)


def _judge_quantised(judged: Judged) -> list[Cell]:
    """Return the cells of an open artefact with Q/DQ, and of its graph without them."""
    cells, noise = quantised_cells(judged)
    # A row that is summed in another order may be rounded to other steps all the way.
    least = judged.tolerance.factor * max(judged.floors.values())
    # What the tensors of its graph do is seen without Q/DQ.
    apart = replace(judged.artefact, path=None)
    loose = Tolerance(atol=max(noise, least), rtol=0.0)
    cells += _contract(replace(judged, artefact=apart, tolerance=loose))
    cells += _left_out(judged)
    alone = replace(judged, extra=replace(judged.extra, generated=None), is_alone=True)
    return cells + plain_cells(judged, lambda plain: _judge(replace(alone, artefact=plain)))


def _contract(judged: Judged) -> list[Cell]:
    """Return the cells of what must hold whatever the numbers are, of each kind of answer."""
    artefact, cell = judged.artefact, judged.artefact.cell()
    cells: list[Cell] = []
    own = {one.subject.output: one.subject for one in judged.exact if one.subject.tasks}
    for output, subject in own.items():
        some = replace(judged, exact=[one for one in judged.exact if one.subject == subject])
        found = [cell for check in CONTRACT for cell in check(some)]
        cells += [replace(cell, case=f"{cell.case}, {output}") for cell in found]
    if not cells:
        cells = [cell for check in CONTRACT for cell in check(judged)]
    if artefact.graph is not None:
        cells.append(table_cell(cell, artefact.graph, judged.tasks))
        if artefact.graph.name in PROBED and artefact.serves_all:
            cells.append(stored_cell(cell, artefact.graph, judged.bound.adapters))
    if not own and artefact.embedding is None:
        cells += padding_only_cells(judged)
    return cells


def _left_out(judged: Judged) -> list[Cell]:
    """Return a cell for each case and check that an artefact was not put through, and why."""
    task, left_out = judged.artefact.task, judged.extra.left_out
    other = {f"{ONE_ROW}{index}" for index in range(len(left_out))}
    if task is not None:
        other.discard(f"{ONE_ROW}{task.index}")
        other |= {LAYERS, ZEROED}  # a merged model has no adapters
    return [
        judged.not_run(name, reason)
        for name, reason in left_out.items()
        if task is None or name not in other
    ]


def versions() -> dict[str, str]:
    """Return the versions of what computed the numbers."""
    found = {"mtl-export": VERSION}
    for package in ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
