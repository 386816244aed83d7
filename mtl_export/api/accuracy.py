"""``parity`` on labelled rows: what each task's score drops by, and the gate on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mtl_export.api.progress import Progress
from mtl_export.errors import BackendMissingError, MtlExportError, UsageError

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.parity.accuracy.labelled_rows import LabelledRows
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.report import ParityReport
    from mtl_export.runtime.runners.base import Runner

EXIT_PARITY, EXIT_ACCURACY, EXIT_MISSING = 3, 4, 6
DEFAULT_MAX_DROP = 1.0
SCORES = ("accuracy", "f1", "auc", "ndcg", "spearman")


@dataclass(frozen=True, slots=True)
class Gate:
    """What is asked of accuracy.

    Attributes:
        dataset: The labelled rows.
        max_drop: Points the worst task may lose.
        scores: Score by task; "" for all others.
    """

    dataset: str
    max_drop: float
    scores: Mapping[str, str]


def gate_of(dataset: str | None, max_drop: float | None, scores: Mapping[str, str]) -> Gate | None:
    """Return what the options ask of accuracy; None without labelled rows."""
    if dataset is None:
        return None
    return Gate(dataset, DEFAULT_MAX_DROP if max_drop is None else max_drop, scores)


def refuse_alone(
    dataset: str | None, typed: Collection[str], artefacts: Sequence[Artefact]
) -> None:
    """Refuse a largest drop and scores that judge nothing.

    Without labelled rows a largest drop judges what calibrate counted for quantised artefacts.

    Args:
        dataset: The labelled rows.
        typed: Names of the options given for this very call: what stands in the settings file
            or the environment may be meant for other runs.
        artefacts: What is judged.

    Raises:
        UsageError: One was given without labelled rows.
    """
    if dataset is not None:
        return
    judged = {"max_drop"} if any(one.quantised is not None for one in artefacts) else set()
    for name in ("max_drop", "score"):
        if name in typed and name not in judged:
            raise UsageError(
                f"--{name.replace('_', '-')}: it was given without --dataset",
                expected=(
                    "labelled rows to count a score on, because no score is counted without them, "
                    "so nothing would be judged by it"
                ),
                fix="Pass --dataset too, or leave it out",
            )


def open_gate(bound: BoundModel, gate: Gate) -> LabelledRows:
    """Return the labelled rows, read before anything is compared.

    Raises:
        CalibrationError: They cannot be used.
    """
    from mtl_export.checkpoint.checkpoint import task_named
    from mtl_export.checkpoint.model_inputs import longest_sequence
    from mtl_export.data.model_arrays import model_arrays
    from mtl_export.parity.accuracy.labelled_files import open_labelled

    tasks = bound.adapters.tasks
    for name in gate.scores:
        if name:
            task_named(tasks, name)
    plain = gate.scores.get("")
    scores = {task.name: plain for task in tasks} if plain else {}
    rows = open_labelled(
        gate.dataset,
        tasks,
        bound.base.folder,
        max_length=longest_sequence(bound.base.config, unlimited=512),
        scores={**scores, **{name: score for name, score in gate.scores.items() if name}},
    )
    config = bound.base.config
    return replace(rows, inputs=model_arrays(rows.inputs, config, f"--dataset {gate.dataset}"))


def with_accuracy(
    report: ParityReport,
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    rows: LabelledRows,
    *,
    max_drop: float,
    oracle: Callable[[str], Runner],
    progress: Progress,
) -> ParityReport:
    """Return ``report`` with the scores of every artefact, and the hash of the rows."""
    from mtl_export.parity.accuracy.labelled_rows import accuracy_cells

    progress.expect(1 + len(artefacts))
    cells = accuracy_cells(
        bound,
        artefacts,
        rows,
        oracle=oracle,
        max_drop=max_drop / 100,
        progress=progress.begin,
    )
    sources = {**report.sources, "dataset_sha256": _sha256(rows)}
    return replace(report, accuracy=cells, sources=sources)


def outcome(report: ParityReport) -> tuple[int, MtlExportError | None]:
    """Return the exit code of a report, and the error that a 2 or a 6 stands for."""
    if report.parity_verdict == "failed":
        return EXIT_PARITY, None
    if report.accuracy and report.accuracy_verdict == "failed":
        return EXIT_ACCURACY, None
    if report.parity_verdict == "not-run":
        return EXIT_MISSING, BackendMissingError(
            "parity: artefacts are there but none could be run",
            expected="at least one comparison",
            fix="See mtl-export doctor for what is missing",
        )
    undecided = [cell for cell in report.accuracy if cell.is_undecided]
    if undecided:
        return 2, UsageError(
            f"--dataset, task {undecided[0].task}: {undecided[0].reason}",
            expected="rows that can tell, because noise must neither pass nor fail a build",
            fix="Add rows to --dataset, or allow more with --max-drop",
        )
    return 0, None


def _sha256(rows: LabelledRows) -> str:
    """Return one hash of all rows and labels: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    values = dict(rows.inputs)
    for name, truth in rows.truths.items():
        values[f"labels of {name} for {truth.score}"] = truth.labels
        if truth.queries is not None:
            values[f"queries of {name}"] = truth.queries
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
