from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, EngineRunError, UsageError
from mtl_export.parity.cases import Case
from mtl_export.parity.report import Cell
from mtl_export.parity.run import RunOptions, run_parity, step_count
from mtl_export.parity.tolerance import Tolerance
from tests.parity.fakes import (
    ERROR,
    TASKS,
    Answer,
    FakeRunner,
    changed,
    exact,
    failed,
    judge,
    merged,
    oracle,
    right,
    right_for,
    single,
)

ROW_CHECKS = (
    "rows permuted", "rows one by one", "padded further", "beside padding only", "padding only",
)  # fmt: skip


def test_right_artefacts_pass_in_every_case_for_every_task(
    bound: BoundModel, cases: list[Case]
) -> None:
    """Each case has one cell per task in it; a single graph is asked more."""
    artefacts = [single(bound, right), *(merged(bound, t, right_for(t)) for t in range(3))]
    report = judge(bound, cases, *artefacts)
    assert report.verdict == "passed"
    assert not failed(report)
    expected = {
        ("single graph", TASKS[t].name, case.name)
        for case in cases
        for t in set(case.task_ids.tolist())
    }
    expected |= {("merged", task, case) for _, task, case in expected}
    expected.add(("single graph", "*", "bad task ids"))
    expected.add(("single graph", "*", "task ids of a wrong kind"))
    expected.add(("single graph", "*", "neighbours change task"))
    owners = [("single graph", "*"), *(("merged", task.name) for task in TASKS)]
    checks = {(*owner, check) for owner in owners for check in ROW_CHECKS}
    expected |= checks
    assert {(c.artefact, c.task, c.case) for c in report.cells} == expected
    assert len(report.cells) == len(expected)
    for cell in report.cells:
        if cell.task != "*" and cell.case not in ROW_CHECKS:
            assert cell.max_abs_error == pytest.approx(1.5e-6, rel=1e-3)
            assert cell.noise_floor == pytest.approx(1e-6, rel=1e-3)
            assert cell.limit == pytest.approx(8e-6, rel=1e-3)
            assert cell.decisions is not None


def test_the_report_says_what_was_compared(bound: BoundModel, cases: list[Case]) -> None:
    """Sources, versions, rule and floors are in the report."""
    report = judge(bound, cases, single(bound, right))
    assert report.sources == {"base_sha256": bound.base.sha256, "checkpoint_sha256": "c" * 64}
    assert {"mtl-export", "torch", "transformers", "onnx"} <= report.versions.keys()
    assert report.tolerance == "|error| <= 8 x noise floor"
    assert report.noise_floors["fp32"].keys() == {"a", "b", "c"}


def test_runners_are_closed(bound: BoundModel, cases: list[Case]) -> None:
    """One model is open at a time, none afterwards."""
    artefact = single(bound, right)
    judge(bound, cases, artefact)
    assert isinstance(artefact.runner, FakeRunner)
    assert not artefact.runner.is_open


def test_each_artefact_is_judged_by_its_own_dtypes_floor(
    bound: BoundModel, cases: list[Case]
) -> None:
    """An error of 1e-3 passes in bfloat16 and fails in float32."""

    def coarse(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": exact(inputs) + 1e-3}

    report = judge(bound, cases, single(bound, coarse), single(bound, coarse, "bf16"))
    half = len(report.cells) // 2
    assert {c.verdict for c in report.cells[:half] if c.task != "*"} == {"failed"}
    assert {c.verdict for c in report.cells[half:]} == {"passed"}
    assert list(report.noise_floors) == ["bf16", "fp32"]


def test_progress_is_told_step_by_step(bound: BoundModel, cases: list[Case]) -> None:
    """As many steps as step_count says: the oracle, its floors, and each artefact."""
    steps: list[str] = []
    artefacts = [single(bound, right), single(bound, right, "fp16")]
    options = RunOptions(progress=steps.append)
    run_parity(bound, artefacts, cases, tolerance=Tolerance(), oracle=oracle, options=options)
    assert len(steps) == step_count(artefacts) == 5
    assert steps[0] == "oracle fp64"
    assert steps[-1] == "single graph"


@pytest.mark.parametrize(("error", "verdict"), [(0.2, "passed"), (0.3, "failed")])
def test_atol_is_kept_to_the_letter(
    bound: BoundModel, cases: list[Case], error: float, verdict: str
) -> None:
    """An error within atol passes, one beyond it fails with its place and what was allowed."""
    artefact = merged(bound, 2, lambda inputs: {"logits": right_for(2)(inputs)["logits"] + error})
    report = judge(bound, cases, artefact, tolerance=Tolerance(atol=0.25, rtol=0.0))
    assert report.verdict == verdict
    if verdict == "failed":
        cell = report.cells[0]
        assert cell.limit == 0.25
        assert cell.max_abs_error == pytest.approx(error, abs=1e-5)
        assert cell.reason.startswith("error 0.3 at row ")
        assert cell.reason.endswith("logit 0; allowed 0.25")


def test_one_wrong_logit_fails_its_task_only(bound: BoundModel, cases: list[Case]) -> None:
    """An error in one logit of task 1 fails task 1's cells and no other."""

    def spoil(logits: Array, ids: Array) -> None:
        logits[ids == 1, 3] += 1e-3

    report = judge(bound, cases, single(bound, changed(spoil)))
    assert {cell.task for cell in failed(report)} == {"b"}
    assert all("logit 3" in cell.reason for cell in failed(report))
    assert report.verdict == "failed"


def fixed(logits: list[float]) -> Answer:
    """Answer every row with ``logits``, and NaN where the id is unknown."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        ids = inputs["task_ids"]
        found = np.repeat(np.array([logits]), len(ids), axis=0)
        found[(ids < 0) | (ids >= len(TASKS))] = np.nan
        return {"logits": found}

    return answer


@pytest.mark.parametrize(
    ("candidate", "tolerance", "verdict", "agreed", "reason"),
    [
        # A flip of a margin of 1 fails however large an error is allowed.
        (99.4, Tolerance(atol=5.0, rtol=0.0), "failed", (1, 0, 0), "1 of 1 decisions changed"),
        (99.4, Tolerance(atol=0.0, rtol=9.0), "failed", (1, 0, 0), "1 of 1 decisions changed"),
        # The same error without a flip is what was allowed.
        (100.6, Tolerance(atol=5.0, rtol=0.0), "passed", (1, 1, 0), ""),
        # An error that is not allowed is named first.
        (99.4, Tolerance(), "failed", (1, 0, 0), "error 0.6"),
    ],
)
def test_a_changed_decision_fails_though_every_error_is_allowed(
    bound: BoundModel,
    candidate: float,
    tolerance: Tolerance,
    verdict: str,
    agreed: tuple[int, int, int],
    reason: str,
) -> None:
    """An argmax that flips beyond the noise floor is a failure of its own."""
    ids = np.array([[1, 2, 3]])
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids), "task_ids": np.array([0])}
    artefact = single(bound, fixed([candidate, 99.5, -np.inf, -np.inf]))
    report = run_parity(
        bound, [artefact], [Case("only", rows)], tolerance=tolerance,
        oracle=lambda dtype: FakeRunner(fixed([100.0, 99.0, -np.inf, -np.inf])),
    )  # fmt: skip
    cell = report.cells[0]
    assert (cell.verdict, cell.decisions) == (verdict, agreed)
    assert reason in cell.reason


def test_a_flip_within_the_noise_is_a_tie(bound: BoundModel) -> None:
    """Two logits closer than the noise may change places; the cell counts the tie."""
    ids = np.array([[1, 2, 3]])
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids), "task_ids": np.array([0])}
    artefact = single(bound, fixed([1.0, 1.0 + 1e-7, -np.inf, -np.inf]))
    report = run_parity(
        bound, [artefact], [Case("only", rows)], tolerance=Tolerance(),
        oracle=lambda dtype: FakeRunner(fixed([1.0 + 1e-7, 1.0, -np.inf, -np.inf])),
    )  # fmt: skip
    assert (report.cells[0].verdict, report.cells[0].decisions) == ("passed", (1, 0, 1))


def tokens(inputs: Mapping[str, Array], width: int = 6) -> Array:
    """Return logits of every token, ``[B, S, width]``; NaN for an unknown id."""
    ids = inputs["task_ids"][:, None, None]
    columns = np.arange(width)
    logits = 3 * np.sin(inputs["input_ids"][:, :, None] * (columns + 1) + 2.0 * ids)
    return np.where((ids >= 0) & (ids < len(TASKS)), logits, np.nan)


@pytest.mark.parametrize(
    ("fault", "verdict"), [("none", "passed"), ("padding", "passed"), ("token", "failed"),
                           ("nan", "failed"), ("shape", "failed")],
)  # fmt: skip
def test_a_language_model_is_judged_token_by_token(
    bound: BoundModel, cases: list[Case], fault: str, verdict: str
) -> None:
    """Every token that counts is compared, padding is not."""
    headless = tuple(replace(task, labels=(), kind="headless") for task in TASKS)
    model = replace(bound, adapters=replace(bound.adapters, tasks=headless, heads={}))

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = tokens(inputs) + 1e-7
        is_padding = inputs["attention_mask"] == 0
        every, first = np.arange(len(logits)), inputs["attention_mask"].argmax(axis=1)
        if fault == "padding":
            logits[is_padding & (inputs["task_ids"] >= 0)[:, None]] = 77.0
        if fault == "token":
            logits[every, first, 5] += 0.5
        if fault == "nan":
            logits[every, first, 5] = np.nan
        return {"logits": logits[:, :-1] if fault == "shape" else logits}

    report = run_parity(
        model, [single(model, answer)], cases, tolerance=Tolerance(),
        oracle=lambda dtype: FakeRunner(lambda i: {"logits": tokens(i) + ERROR[dtype]}),
    )  # fmt: skip
    by_case = [cell for cell in report.cells if cell.task != "*"]
    assert {cell.verdict for cell in by_case} == {verdict}


def test_a_row_that_depends_on_its_neighbours_tasks_fails(
    bound: BoundModel, cases: list[Case]
) -> None:
    """A last-bit change of a row when other rows change task is no isolation."""

    def leaky(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        return {"logits": logits * (1 + 1e-15 * inputs["task_ids"].sum())}

    (cell,) = failed(judge(bound, cases, single(bound, leaky)))
    assert cell.case == "neighbours change task"
    assert "bit for bit" in cell.reason


def test_files_that_are_known_to_be_wrong_fail_without_being_run(
    bound: BoundModel, cases: list[Case]
) -> None:
    """A defect is a failure with its reason, even where nothing could be run."""
    runner = FakeRunner(right, refuses=missing())
    artefact = replace(single(bound, right), runner=runner, defect="config.json has changed")
    (cell,) = judge(bound, cases, artefact).cells
    assert (cell.verdict, cell.reason) == ("failed", "config.json has changed")


def missing() -> BackendMissingError:
    """Return the error of a backend that is not there."""
    return BackendMissingError("tensorrt: no GPU", expected="one", fix="Get one")


def test_what_cannot_run_is_not_run(bound: BoundModel, cases: list[Case]) -> None:
    """A missing backend is not-run with its reason, and never makes a pass."""
    artefact = replace(single(bound, right), runner=FakeRunner(right, refuses=missing()))
    report = judge(bound, cases, artefact)
    (cell,) = report.cells
    assert (cell.verdict, cell.max_abs_error) == ("not-run", None)
    assert "no GPU" in cell.reason
    assert report.verdict == "not-run"
    assert report.count("passed") == 0
    both = judge(bound, cases, artefact, single(bound, right))
    assert (both.count("not-run"), both.count("failed")) == (1, 0)


def test_a_backend_that_goes_away_does_not_hide_a_failure(
    bound: BoundModel, cases: list[Case]
) -> None:
    """Cells already judged stay when the backend is lost in the middle."""
    calls: list[int] = []

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        calls.append(1)
        if len(calls) > 1:
            raise missing()
        return {}

    report = judge(bound, cases, single(bound, answer))
    assert [cell.verdict for cell in report.cells] == ["failed", "not-run"]
    assert report.verdict == "failed"


@pytest.mark.parametrize("on_enter", [True, False])
def test_a_runtime_that_refuses_fails(bound: BoundModel, cases: list[Case], on_enter: bool) -> None:
    """A file that cannot be opened or run is a failure, not something that did not run."""
    error = EngineRunError("model.onnx: broken", expected="whole", fix="Export")

    def refuse(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise error

    runner = FakeRunner(refuse, refuses=error if on_enter else None)
    report = judge(bound, cases, replace(single(bound, right), runner=runner))
    assert report.verdict == "failed"
    assert "broken" in report.cells[-1].reason


def test_a_bug_keeps_its_traceback(bound: BoundModel, cases: list[Case]) -> None:
    """An error that is not ours is not turned into a verdict."""

    def bug(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        judge(bound, cases, single(bound, bug))


def test_what_is_not_there_is_reported(bound: BoundModel, cases: list[Case]) -> None:
    """Artefacts that do not exist are cells too, and pass nothing."""
    absent = Cell("engine", "tensorrt", "*", "*", "not-run", "not built")
    report = run_parity(bound, [], cases, tolerance=Tolerance(), oracle=oracle)
    report = replace(report, cells=(*report.cells, absent))
    assert report.cells == (absent,)
    assert report.verdict == "not-run"


def test_merged_artefacts_see_their_own_rows_without_ids(
    bound: BoundModel, cases: list[Case]
) -> None:
    """A merged artefact gets exactly its task's rows of every case."""
    artefact = merged(bound, 1, right_for(1))
    judge(bound, cases, artefact)
    assert isinstance(artefact.runner, FakeRunner)
    counts = [int((case.task_ids == 1).sum()) for case in cases]
    own = [count for count in counts if count]
    asked_first = artefact.runner.asked[: len(own)]  # then comes what a row must keep to itself
    assert [len(asked["input_ids"]) for asked in asked_first] == own
    assert all("task_ids" not in asked for asked in artefact.runner.asked)


def test_the_report_says_the_least_tolerance_that_passes(
    bound: BoundModel, cases: list[Case]
) -> None:
    """By output; with it the run passes, with a little less it fails."""
    report = judge(bound, cases, single(bound, right))
    assert list(report.least_tolerances) == ["logits"]
    atol, factor = report.least_tolerances["logits"]
    assert atol == pytest.approx(1.5e-6, rel=1e-6)
    assert factor == pytest.approx(1.5, rel=1e-3)
    for share, verdict in ((1.0, "passed"), (0.99, "failed")):
        own = Tolerance.from_texts([f"logits:{atol * share!r}"], ["logits:0"])
        assert judge(bound, cases, single(bound, right), tolerance=own).verdict == verdict


def test_a_tolerance_for_an_output_that_is_not_compared_is_refused(
    bound: BoundModel, cases: list[Case]
) -> None:
    """A misspelt name would leave the output to the default."""
    wrong = Tolerance.from_texts(["logit:1"], ["logit:0"])
    with pytest.raises(UsageError, match="logit"):
        judge(bound, cases, single(bound, right), tolerance=wrong)
