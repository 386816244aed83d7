"""Say which layer of a failed artefact is wrong, for which task, and why where that is known.

    failed cells -> the batches that show them -> activations -> verdicts (``layer_judgement``)

One batch for several tasks where that shows them; what cannot be looked into says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import MtlExportError
from mtl_export.names import ATTENTION_MASK, TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import MIXED, Case
from mtl_export.parity.diagnosis.activations import (
    Activation,
    Activations,
    GraphLayers,
    OracleLayers,
    merged_activations,
)
from mtl_export.parity.diagnosis.layer_errors import Bisection, Finding, LayerError, Localisation
from mtl_export.parity.diagnosis.layer_verdicts import (
    LayerValues,
    activation_floors,
    finding,
    in_other_orders,
    judged,
    levelled,
    measured,
)
from mtl_export.parity.diagnosis.precision_bisect import (
    HALF_DTYPES,
    FailedArtefact,
    bisect_precision,
)
from mtl_export.parity.report import Cell, ParityReport
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS

ALL = "*"
# Graphs that can be looked into, and run on one batch without a cache.
TAPPED = frozenset({"model.onnx", "prefill.onnx"})


def localise(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    cases: Sequence[Case],
    report: ParityReport,
    *,
    oracle: Callable[[str], Runner],
    threads: int = 0,
    bisect: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Localisation, ...]:
    """Return what is known of each artefact that failed; nothing where all passed.

    Args:
        bound: The checkpoint and its base.
        artefacts: What was judged.
        cases: What it was judged on.
        report: What came of it.
        oracle: As for ``run_parity``.
        threads: Of ONNX Runtime; 0 lets it decide.
        bisect: Also say which layers of half-precision graphs must compute in float32.
        progress: Called with the name of each step as it begins.
    """
    failed = [(one, cells) for one in artefacts if (cells := failed_cells(report, one))]
    if not failed:
        return ()
    modules = looked_at(bound)
    found = []
    with ExitStack() as stack:
        oracles: dict[str, OracleLayers] = {}

        def layers(dtype: str) -> OracleLayers:
            if dtype not in oracles:
                runner = stack.enter_context(_open(oracle(dtype)))
                oracles[dtype] = OracleLayers(runner, modules)
            return oracles[dtype]

        for artefact, cells in failed:
            name = artefact.task.name if artefact.task else ALL
            progress(f"layers of {artefact.name} {name if artefact.task else ''}".rstrip())
            reason = _unseen(artefact, cells)
            own = FailedArtefact(artefact, cells, modules, threads)
            one = Localisation(artefact.name, name, reason=reason)
            if not reason:
                try:
                    one = _localised(bound, own, cases, layers)
                except (MtlExportError, ValueError, OSError) as error:
                    # onnx-ir refuses data files with several hard links.
                    one = replace(one, reason=str(error))
            if bisect and not reason and artefact.dtype in HALF_DTYPES:
                progress(f"precision of {artefact.name}")
                runner = stack.enter_context(_open(oracle("fp64")))
                bisection = _bisected(bound, own, cases, runner)
                one = replace(one, bisection=bisection)
            found.append(one)
    return tuple(found)


def failed_cells(report: ParityReport, artefact: Artefact) -> list[Cell]:
    """Return the cells of an artefact that failed."""
    own = {ALL, artefact.task.name} if artefact.task else None
    return [
        cell
        for cell in report.cells
        if cell.artefact == artefact.name
        and cell.verdict == "failed"
        and (own is None or cell.task in own)
    ]


def looked_at(bound: BoundModel) -> list[str]:
    """Return the layers that tasks change: adapted ones, heads, and what tasks replace."""
    adapters = bound.adapters
    own = [name.rpartition(".")[0] for name in adapters.own_tensors]
    return list(dict.fromkeys([*adapters.outlines, *adapters.heads, *own]))


def chosen_cases(
    cells: Sequence[Cell], cases: Sequence[Case], tasks: Sequence[Task]
) -> list[tuple[Case, frozenset[str]]]:
    """Return the fewest batches that show every task that failed, and which each shows.

    Small batches come first; the first also shows the tasks that passed. Where only checks
    without a batch of their own failed, it is the one of mixed tasks.
    """
    seen = {case.name: case for case in cases if NEW_TOKENS not in case.inputs}
    by_case: dict[str, set[str]] = {}
    for cell in cells:
        name = cell.case if cell.case in seen else cell.case.rpartition(", ")[0]
        if name in seen and cell.task != ALL:
            by_case.setdefault(name, set()).add(cell.task)
    left: set[str] = set().union(*by_case.values())
    passed = {task.name for task in tasks} - left
    chosen = []
    while left:
        name = max(by_case, key=lambda one: (len(by_case[one] & left), -_size(seen[one])))
        chosen.append((seen[name], frozenset(by_case[name] & left | passed)))
        left, passed = left - by_case[name], set()
    if not chosen and MIXED in seen:
        return [(seen[MIXED], frozenset(passed))]
    return chosen


def _size(case: Case) -> int:
    return sum(value.size for value in case.inputs.values())


def _open(runner: Runner) -> AbstractContextManager[Runner]:
    return runner


def _unseen(artefact: Artefact, cells: Sequence[Cell]) -> str:
    """Return why an artefact cannot be looked into; "" if it can."""
    if all(cell.case == ALL for cell in cells):
        return "it was not run, so no layer of it can be compared"
    path = artefact.path
    if path is None:
        return "it has no file"
    if artefact.edited is not None:
        return f"it was {artefact.edited.text}: only a graph as it was exported is looked into"
    if artefact.quantised is not None:
        return "all layers of a quantised graph err: which of them cost most, calibrate tells"
    if path.suffix == ".onnx":
        if path.name in TAPPED:
            return ""
        return f"{path.name} is one of several graphs, and its layers are seen in none alone"
    if path.is_dir() and getattr(artefact.runner, "models", None) is not None:
        return ""
    return "an engine shows no layers; the ONNX graph that it was built from does"


def _localised(
    bound: BoundModel,
    failed: FailedArtefact,
    cases: Sequence[Case],
    oracle: Callable[[str], OracleLayers],
) -> Localisation:
    artefact, modules = failed.artefact, failed.modules
    name = artefact.task.name if artefact.task else ALL
    tasks = bound.adapters.tasks if artefact.task is None else (artefact.task,)
    chosen = chosen_cases(failed.cells, cases, tasks)
    if not chosen:
        reason = "only what follows new tokens is wrong, and layers are seen in prompts alone"
        return Localisation(artefact.name, name, reason=reason)
    exact, lower = oracle("fp64"), oracle(artefact.dtype)
    layers: list[LayerError] = []
    findings: list[Finding] = []
    with ExitStack() as stack:
        candidate = _candidate(artefact, modules, failed.threads, stack)
        for case, shown in chosen:
            own_tasks = [task for task in tasks if task.name in shown]
            sizes = [
                measured(bound, at_layer, exact, lower, artefact.dtype)
                for at_layer in _sights(own_tasks, case, candidate, exact, lower, artefact)
            ]
            verdicts = judged(bound, levelled(sizes), case, artefact.dtype)
            layers += [error for _, error in verdicts]
            for task in own_tasks:
                own = [(size, error) for size, error in verdicts if size.task == task]
                if own:
                    findings.append(finding(task.name, case, own))
    order = {module: place for place, module in enumerate(dict.fromkeys(e.layer for e in layers))}
    layers.sort(key=lambda one: order[one.layer])
    unseen = tuple(module for module in modules if module not in order)
    reason = "" if layers else "no layer of it is given rows that can be told apart"
    return Localisation(artefact.name, name, tuple(findings), tuple(layers), reason, unseen)


def _bisected(
    bound: BoundModel, failed: FailedArtefact, cases: Sequence[Case], oracle: Runner
) -> Bisection | None:
    """Return what comes of the bisect, or why nothing does; None for what is no graph."""
    artefact = failed.artefact
    tasks = bound.adapters.tasks if artefact.task is None else (artefact.task,)
    chosen = chosen_cases(failed.cells, cases, tasks)
    if artefact.path is None or artefact.path.suffix != ".onnx" or not chosen:
        return None
    case, shown = chosen[0]
    own = [task for task in tasks if task.name in shown]
    try:
        return bisect_precision(failed, case, own, oracle)
    except (MtlExportError, ValueError, OSError) as error:
        return Bisection(case.name, None, None, (), 0, f"no bisect: {error}")


# Of a batch, the activations of all layers; and whether a batch must be of one task.
_Candidate = tuple[Callable[[Mapping[str, Array]], Activations], bool]


def _candidate(
    artefact: Artefact, modules: Sequence[str], threads: int, stack: ExitStack
) -> _Candidate:
    assert artefact.path is not None
    if artefact.path.suffix == ".onnx":
        graph = GraphLayers(artefact.path, modules, threads)
        return graph.activations, graph.runs_by_task
    runner = stack.enter_context(_open(artefact.runner))
    return lambda inputs: merged_activations(runner, inputs, modules), True


def _sights(
    tasks: Sequence[Task],
    case: Case,
    candidate: _Candidate,
    exact: OracleLayers,
    lower: OracleLayers,
    artefact: Artefact,
) -> Iterator[LayerValues]:
    """Yield every layer under every task that the case has rows of."""
    infer, by_task = candidate
    by_task = by_task or artefact.task is not None
    whole = {} if by_task else infer(case.inputs)
    # Rows that are not the batch's (windows, packed tokens) cannot be told apart from outside.
    by_task = by_task or any(
        len(one.given) not in {1, len(case.task_ids)} for one in whole.values()
    )
    for task in tasks:
        rows = case.task_ids == task.index
        if not rows.any():
            continue
        inputs = case.rows(rows)
        if by_task:
            kept = artefact.task is None
            own = infer({n: v for n, v in inputs.items() if kept or n != TASK_IDS})
        else:
            own = {module: _rows(one, rows) for module, one in whole.items()}
        right, mask = exact.activations(inputs, task.index), _mask(inputs.get(ATTENTION_MASK))
        floors = activation_floors(right, _in_orders(lower, inputs, task), mask, artefact.dtype)
        for module in own:
            if module in right and own[module].given.shape == right[module].given.shape:
                yield LayerValues(module, task, right[module], floors[module], own[module], mask)


def _in_orders(
    lower: OracleLayers, inputs: Mapping[str, Array], task: Task
) -> Iterator[Activations]:
    yield lower.activations(inputs, task.index)
    yield from in_other_orders(lambda: lower.activations(inputs, task.index))


def _mask(mask: Array | None) -> Array | None:
    return None if mask is None else mask == 1


def _rows(activation: Activation, rows: Array) -> Activation:
    """Return what belongs to some rows of the batch."""

    def own(value: Array) -> Array:
        return value[rows] if len(value) == len(rows) else value

    return Activation(own(activation.given), own(activation.result), activation.is_quantised)
