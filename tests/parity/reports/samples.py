"""Reports of every kind, with texts that escape badly and numbers that are told exactly."""

from __future__ import annotations

from dataclasses import replace

from mtl_export.parity.diagnosis.layer_errors import Bisection, Finding, LayerError, Localisation
from mtl_export.parity.report import AccuracyCell, ArtefactFiles, Cell, ParityReport

TASKS = ("ads_rel", "topic <b>|*@who", "spam")
FLOOR, LIMIT = 1.25e-6, 1e-5
NASTY = 'ids [4294967297] are answered | <img src=x> & "quoted" \x00\x1b]\n@everyone `code`'


def cell(artefact: str, task: str, case: str, error: float, **more: object) -> Cell:
    """Return a compared cell, failed when the error is beyond the limit."""
    bad = error > LIMIT
    reason = f"error {error:.3g} at row 2, logit 1; allowed {LIMIT:.3g}" if bad else ""
    made = Cell(
        artefact, "onnxruntime", task, case, "failed" if bad else "passed", reason, error, FLOOR,
        LIMIT, (4, 4, 0),
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


def cells() -> tuple[Cell, ...]:
    """Return cells of each verdict and of each rule."""
    made = []
    for index, task in enumerate(TASKS):
        for place, case in enumerate((f"task {index}", "mixed tasks", "batch 7 x 97")):
            made.append(cell("single graph", task, case, 3e-7 * (1 + index + 3 * place)))
    made += [
        cell("single graph", TASKS[0], "mixed tasks, batch 3", 7.123456789e-4),
        cell(
            "single graph", TASKS[1], "mixed tasks, batch 3", 9e-6, verdict="failed",
            reason="1 of 4 decisions changed", decisions=(4, 3, 0),
        ),
        Cell("single graph", "onnxruntime", "*", "bad task ids", "failed", NASTY),
        Cell("single graph", "onnxruntime", "*", "neighbours change task", "passed"),
        Cell("merged", "pytorch", TASKS[0], "mixed tasks", "failed", "no output 'logits'"),
        Cell("merged", "pytorch", TASKS[1], "*", "failed", "made from 1234..., export it again"),
        Cell("engine", "-", TASKS[2], "*", "not-run", "no GPU & no <driver>"),
        Cell("engine", "-", TASKS[2], "*", "not-run", "no GPU & no <driver>"),
        cell("merged", TASKS[2], "task 2", 0.0),
    ]  # fmt: skip
    return tuple(made)


def scores() -> tuple[AccuracyCell, ...]:
    """Return scores of each verdict: passed, dropped, undecided, never asked, not scored."""
    rows = "single graph", TASKS[1]
    return (
        AccuracyCell("single graph", TASKS[0], "accuracy", 400, 0.9125, 0.91, -0.0025, 0.0075,
                     0.01, "passed"),
        AccuracyCell(*rows, "auc", 400, 0.987654321, 0.9, 0.06, 0.11, 0.01, "failed",
                     "drops by 0.0877 | <b>at least</b> 0.0600; allowed is 0.01"),
        AccuracyCell("single graph", TASKS[2], "f1", 20, 0.8, 0.75, -0.05, 0.15, 0.01, "not-run",
                     "these 20 rows cannot tell"),
        AccuracyCell("engine", TASKS[2], "f1", 20, None, None, None, None, 0.01, "not-run",
                     "no GPU & no <driver>"),
        AccuracyCell("merged", TASKS[0], "accuracy", 400, 0.9125, None, None, None, 0.01,
                     "failed", "answers that are NaN or Inf, or all the same"),
    )  # fmt: skip


def failing() -> ParityReport:
    """Return a report with everything in it."""
    return ParityReport(
        cells=cells(),
        tolerance="|error| <= 8 x noise floor",
        noise_floors={"fp32": dict.fromkeys(TASKS, FLOOR)},
        sources={"base_sha256": "a" * 64, "checkpoint_sha256": "b" * 64},
        versions={"mtl-export": "0.1.0", "torch": "2.13.0"},
        artefacts=(
            ArtefactFiles("single graph", "*", "out/onnx/model.onnx",
                          {"model.onnx": "c" * 64, "model.onnx.data": "d" * 64}),
            ArtefactFiles("merged", TASKS[0], "out/merged/ads rel",
                          {"config.json": "e" * 64, "model.safetensors": "f" * 64}),
            ArtefactFiles("merged", TASKS[1], "/elsewhere/topic", {"config.json": "e" * 64}),
        ),
    )  # fmt: skip


def passing() -> ParityReport:
    """Return a report in which what ran has passed."""
    kept = tuple(one for one in cells() if one.verdict != "failed")
    return replace(failing(), cells=kept)


def nothing_ran() -> ParityReport:
    """Return a report in which nothing could be run."""
    kept = tuple(one for one in cells() if one.verdict == "not-run")
    return replace(failing(), cells=kept, artefacts=())


def scored() -> ParityReport:
    """Return a report whose numbers pass and whose scores do not all."""
    return replace(passing(), accuracy=scores())


def score_passed() -> ParityReport:
    """Return a report in which labelled rows passed too."""
    return replace(passing(), accuracy=scores()[:1])


def score_undecided() -> ParityReport:
    """Return a report whose labelled rows cannot tell."""
    return replace(passing(), accuracy=(scores()[0], scores()[2]))


def localised() -> tuple[Localisation, ...]:
    """Return where errors begin: in a layer with a known cause, before one, and not known."""
    first, last = "bert.encoder.layer.0.query", "classifier"
    case = "mixed tasks, batch 3"
    layers = (
        LayerError(
            first, TASKS[0], case, 3e-2, 2e-6, 3e-2, 1e-6, "faulty", "Lambda is <transposed>"
        ),
        LayerError(first, TASKS[1], case, None, 2e-6, None, 1e-6, "faulty", "", "only outputs [3]"),
        LayerError(last, TASKS[0], case, 7e-4, 2e-6, 1e-6, 1e-6, "propagated"),
        LayerError(last, TASKS[1], case, 1e-6, 2e-6, 1e-6, 1e-6, "within"),
    )
    findings = (
        Finding(TASKS[0], case, first, "", "Lambda is <transposed>",
                f"{first} is wrong: Lambda is <transposed>"),
        Finding(TASKS[1], case, last, first, "", f"the error begins after {first}, before {last}"),
        Finding(TASKS[2], case, "", last, "", "no layer is beyond 8 noise floors"),
    )  # fmt: skip
    wide = Bisection(case, 3.5, 0.2, (first,), 4, f"{first} must compute in float32")
    return (
        Localisation("single graph", "*", findings, layers, unseen=("pooler",), bisection=wide),
        Localisation("merged", TASKS[1], reason="it was not run & <not seen>"),
    )


def located() -> ParityReport:
    """Return the failing report with where its errors begin."""
    return replace(failing(), localised=localised())


def broken_off() -> ParityReport:
    """Return the report of a comparison that could not be made."""
    error = {
        "error": "CheckpointError", "problem": "adapter & co: it is <broken>",
        "expected": "a checkpoint", "why": "", "fix": "Train it again",
    }  # fmt: skip
    return ParityReport((), "", {}, {}, {"mtl-export": "0.1.0"}, error=error)


REPORTS = {
    "failing": failing, "located": located, "passing": passing, "nothing ran": nothing_ran,
    "broken off": broken_off,
    "scored": scored, "score passed": score_passed, "score undecided": score_undecided,
}  # fmt: skip
