"""Compare every artefact with the oracle, on every case, for every task.

reference   the family's PyTorch oracle, unmerged, float64
candidate   a merged folder in PyTorch, a merged or routed graph, an engine
pass        the error is within the tolerance AND the decisions agree AND nothing
            is missing, misshapen, newly NaN, or answered by a head that should not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, MtlExportError
from mtl_export.graph.origins import EditedGraph
from mtl_export.names import LOGITS, SINGLE_GRAPH
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import ONE_ROW, Case
from mtl_export.parity.checks.edited_graph import unjudged_cells, views_of
from mtl_export.parity.checks.generation import (
    GeneratedTokens,
    bad_step_ids,
    token_cells,
    tokens_of_oracle,
)
from mtl_export.parity.checks.inputs import padding_only_cells, wrong_kind_cell
from mtl_export.parity.checks.logits import compare_case
from mtl_export.parity.checks.metadata import beside_cells
from mtl_export.parity.checks.provenance import wrong_files
from mtl_export.parity.checks.quantised import plain_cells, quantised_cells
from mtl_export.parity.checks.rows import bad_ids_cell, isolation_cell, row_cells
from mtl_export.parity.checks.stored_tensors import stored_cell, table_cell
from mtl_export.parity.checks.task_tensors import weight_cells
from mtl_export.parity.outputs import Subject
from mtl_export.parity.presets import LAYERS, NOTHING, PADDING_ONLY, ZEROED
from mtl_export.parity.probes import ExtraChecks, asked, padding_of
from mtl_export.parity.reference import Floors, Reference, noise_floors, references_of
from mtl_export.parity.report import Cell, ParityReport, Verdict
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.base import Runner
from mtl_export.version import VERSION

# Graphs that see every adapted layer and answer by themselves.
PROBED = frozenset({"model.onnx", "prefill.onnx"})
# No task has these ids; the last wraps to 1 in a runtime that narrows ids to int32.
BAD_IDS = (-1, 2**32 + 1, 2**63 - 1)


@dataclass(frozen=True)
class Judged:
    """One artefact, and what it is judged by.

    Attributes:
        bound: The checkpoint and its base.
        artefact: What is judged.
        exact: What the oracle answers to rows of its tasks.
        generated: What the oracle generates; None where that is not compared.
        floors: Noise floors of the dtype that it computes in.
        tolerance: What is allowed.
        threads: Of ONNX Runtime; 0 lets it decide.
        extra: What is compared besides the cases.
        is_alone: Only its own file is looked at, not those in its folder.
    """

    bound: BoundModel
    artefact: Artefact
    exact: list[Reference]
    generated: GeneratedTokens | None
    floors: Floors
    tolerance: Tolerance
    threads: int
    extra: ExtraChecks
    is_alone: bool = False

    def cell(self, verdict: Verdict = "passed", reason: str = "", case: str = "contract") -> Cell:
        """Return a cell of the artefact's only task, or of all of a single graph's."""
        artefact = self.artefact
        name = artefact.task.name if artefact.task else "*"
        return Cell(artefact.name, artefact.runner.name, name, case, verdict, reason)


def step_count(artefacts: Sequence[Artefact]) -> int:
    """Return how many steps ``run_parity`` takes."""
    return 1 + len(_dtypes(artefacts)) + len(artefacts)


def _dtypes(artefacts: Sequence[Artefact]) -> list[str]:
    return sorted({artefact.dtype for artefact in artefacts})


def run_parity(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    cases: Sequence[Case],
    *,
    tolerance: Tolerance,
    oracle: Callable[[str], Runner],
    not_there: Sequence[Cell] = (),
    left_out: Mapping[str, str] = NOTHING,
    base: Callable[[str], Runner] | str | None = None,
    threads: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> ParityReport:
    """Return the verdict on ``artefacts``.

    Args:
        bound: The checkpoint and its base.
        artefacts: What ships.
        cases: From ``cases.build_cases``.
        tolerance: What is allowed.
        oracle: Returns the oracle in ``fp64``, the reference, or in a candidate's dtype,
            for its noise floor.
        not_there: Cells of artefacts that could have been compared but do not exist.
        left_out: Why cases and checks are not run, by name; from ``presets.choose``.
        base: The oracle of the model without adapters, or why there is none, from
            ``asked.without_adapters``; None leaves that check out without a word.
        threads: Of ONNX Runtime where the tensors of a graph are looked into; 0 lets it decide.
        progress: Called with the name of each step as it begins; ``step_count`` in all.

    Raises:
        ParityError: The oracle itself answers with NaN or Inf, so nothing can be compared; no row
            reaches a layer that tasks adapt; or noise would let any answer pass.
    """
    progress("oracle fp64")
    embeddings = list(dict.fromkeys(artefact.embedding for artefact in artefacts))
    with oracle("fp64") as reference:
        tasks = bound.adapters.tasks
        exact = references_of(reference, cases, embeddings, tasks)
        generated = tokens_of_oracle(reference, cases)
        padding = None if PADDING_ONLY in left_out else padding_of(reference, exact)
    # After the reference is closed: two models in float64 need not fit beside each other.
    extra = asked(padding, exact, left_out, base)
    tolerance.refuse_unknown({one.subject.output for one in exact})
    floors: dict[str, Floors] = {}
    for dtype in _dtypes(artefacts):
        progress(f"oracle {dtype}, for the noise floor")
        floors[dtype] = noise_floors(tasks, exact, oracle(dtype), dtype, tolerance)
    cells: list[Cell] = []
    for artefact in artefacts:
        progress(f"{artefact.name} {artefact.task.name if artefact.task else ''}".rstrip())
        own = [
            one
            for one in exact
            if one.subject.embedding == artefact.embedding
            and (artefact.task is None or one.subject.serves(artefact.task))
        ]
        floor = floors[artefact.dtype]
        cells += _judge(Judged(bound, artefact, own, generated, floor, tolerance, threads, extra))
    return _report(bound, artefacts, [*cells, *not_there], tolerance, floors)


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
        versions=_versions(),
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
    bound, artefact, generated = judged.bound, judged.artefact, judged.generated
    floors, tolerance = judged.floors, judged.tolerance
    if wrong := wrong_files(bound, artefact):
        return [judged.cell("failed", wrong, "*")]
    cells: list[Cell] = []
    try:
        if artefact.edited is not None:
            return _judge_edited(judged, artefact.edited)
        if not judged.is_alone:
            cells += _beside(judged)
        with artefact.runner as runner:
            if artefact.quantised is not None:
                return cells + _judge_quantised(judged, runner)
            for _, group in groupby(judged.exact, key=lambda one: id(one.case)):
                cells += compare_case(bound, artefact, runner, [*group], floors, tolerance)
            cells += _contract(judged, runner)
            cells += _left_out(judged)
            if generated is not None:
                limit = tolerance.of(LOGITS).factor * floors[Subject(LOGITS)]
                cells += token_cells(artefact, runner, generated, bound.adapters.tasks, limit)
                if artefact.kind == SINGLE_GRAPH:
                    cells.append(bad_step_ids(artefact, runner, generated, _bad(bound)))
    except BackendMissingError as error:
        cells.append(judged.cell("not-run", str(error), "*"))
    except MtlExportError as error:
        cells.append(judged.cell("failed", str(error), "*"))
    return cells


def _judge_edited(judged: Judged, edited: EditedGraph) -> list[Cell]:
    """Return the cells of a graph whose tasks were edited."""
    artefact, adapters = judged.artefact, judged.bound.adapters
    path = artefact.path
    cells = unjudged_cells(artefact, edited, adapters)
    for view in views_of(edited, adapters):
        own = view.references(judged.exact)
        runner = view.runner(artefact.runner, own, len(adapters.tasks))
        # What its file holds for other checkpoints' tasks is not known here.
        apart = replace(artefact, runner=runner, path=None, edited=None,
                        checkpoint_sha256=adapters.checkpoint_sha256)  # fmt: skip
        found = _judge(
            replace(
                judged,
                artefact=apart,
                exact=own,
                generated=view.generated(judged.generated),
                extra=view.extra_checks(judged.extra),
                is_alone=True,
            )
        )
        if path is not None and path.suffix == ".onnx":
            cell = Cell(artefact.name, artefact.runner.name, "*", "contract", "passed")
            found += view.file_cells(cell, path, adapters)
        cells += view.named(found)
    return cells + _beside(judged)


def _beside(judged: Judged) -> list[Cell]:
    """Return the cells of what decides what the numbers mean; engines have manifests for it."""
    artefact = judged.artefact
    path, task = artefact.path, artefact.task
    if path is None or not (path.is_dir() or path.suffix == ".onnx"):
        return []
    subjects = [one.subject for one in judged.exact]
    return beside_cells(judged.cell(), judged.bound, path, task, artefact.dtype, subjects)


def _judge_quantised(judged: Judged, runner: Runner) -> list[Cell]:
    """Return the cells of an open artefact with Q/DQ, and of its graph without them."""
    artefact, floors, factor = judged.artefact, judged.floors, judged.tolerance.factor
    cells, noise = quantised_cells(judged.bound, artefact, runner, judged.exact, floors)
    # A row that is summed in another order may be rounded to other steps all the way.
    loose = Tolerance(atol=max(noise, factor * max(floors.values())), rtol=0.0)
    # What the tensors of its graph do is seen without Q/DQ.
    apart = replace(artefact, path=None)
    cells += _contract(replace(judged, artefact=apart, tolerance=loose), runner)
    cells += _left_out(judged)
    return cells + plain_cells(
        artefact,
        lambda plain: _judge(replace(judged, artefact=plain, generated=None, is_alone=True)),
        threads=judged.threads,
        left_out=judged.extra.left_out,
    )


def _contract(judged: Judged, runner: Runner) -> list[Cell]:
    """Return the cells of what must hold whatever the numbers are, of each kind of answer."""
    artefact, adapters, padding = judged.artefact, judged.bound.adapters, judged.extra.padding
    cells: list[Cell] = []
    own = {one.subject.output: one.subject for one in judged.exact if one.subject.tasks}
    for output, subject in own.items():
        some = [one for one in judged.exact if one.subject == subject]
        found = _contract_of(replace(judged, exact=some), runner)
        cells += [replace(cell, case=f"{cell.case}, {output}") for cell in found]
    if not cells:
        cells = _contract_of(judged, runner)
    path, cell = artefact.path, judged.cell()
    if path is not None and path.suffix == ".onnx":
        cells.append(table_cell(cell, path, [artefact.task] if artefact.task else adapters.tasks))
        if path.name in PROBED and artefact.kind == SINGLE_GRAPH:
            cells.append(stored_cell(cell, path, adapters))
    if padding is not None and not own and artefact.embedding is None:
        cells += padding_only_cells(cell, runner, padding, artefact.task)
    return cells


def _left_out(judged: Judged) -> list[Cell]:
    """Return a cell for each case and check that an artefact was not put through, and why."""
    task, left_out = judged.artefact.task, judged.extra.left_out
    other = {f"{ONE_ROW}{index}" for index in range(len(left_out))}
    if task is not None:
        other.discard(f"{ONE_ROW}{task.index}")
        other |= {LAYERS, ZEROED}  # a merged model has no adapters
    return [
        judged.cell("not-run", reason, name)
        for name, reason in left_out.items()
        if task is None or name not in other
    ]


def _contract_of(judged: Judged, runner: Runner) -> list[Cell]:
    bound, artefact, extra = judged.bound, judged.artefact, judged.extra
    cell = judged.cell()
    # One with a column for each row of the batch is no row's own answer.
    own = [one for one in judged.exact if not one.subject.is_across_rows]
    one = max(own, key=lambda one: len(set(one.case.task_ids.tolist())))
    case = one.case
    output = one.subject.output if artefact.task is None else one.subject.merged_output
    cells, shape = [], one.logits.shape[1:]
    finite = one.logits[np.isfinite(one.logits)]
    tolerance, floor = judged.tolerance.of(one.subject.output), judged.floors[one.subject]
    limit = float(tolerance.allowed(finite, floor).max())
    if artefact.kind == SINGLE_GRAPH:
        cells.append(bad_ids_cell(cell, runner, case, output, shape, _bad(bound)))
        cells.append(wrong_kind_cell(cell, runner, case, output))
        cells.append(isolation_cell(cell, runner, case, output, len(bound.adapters.tasks)))
        if artefact.path is not None and artefact.path.name in PROBED:
            path, tasks = artefact.path, bound.adapters.tasks
            cells += weight_cells(
                cell, path, one, tasks, _adapted(bound), judged.threads,
                left_out=extra.left_out, zeroed=extra.zeroed.get(output), limit=limit,
            )  # fmt: skip
    return cells + row_cells(cell, runner, one, artefact.task, limit, extra.left_out)


def _adapted(bound: BoundModel) -> list[str]:
    """Return the layers that some task adapts."""
    return [
        name
        for name, layer in bound.adapters.layers.items()
        if any(layer.factors(task.index) is not None for task in bound.adapters.tasks)
    ]


def _bad(bound: BoundModel) -> Array:
    return np.array([*BAD_IDS, len(bound.adapters.tasks)], np.int64)


def _versions() -> dict[str, str]:
    found = {"mtl-export": VERSION}
    for package in ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
