from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, EngineRunError, MtlExportError, ParityError
from mtl_export.parity.cases import Case, build_cases, seeded_rows
from mtl_export.parity.report import Cell, ParityReport
from mtl_export.parity.run import BAD_IDS, Artefact, run_parity, step_count
from mtl_export.parity.tolerance import Tolerance
from tests.graph import marked

TASKS = marked.TASKS
WIDTHS = [len(task.labels) for task in TASKS]
WIDEST = max(WIDTHS)
Answer = Callable[[Mapping[str, Array]], dict[str, Array]]
ERROR = {"fp64": 0.0, "fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}


def exact(inputs: Mapping[str, Array]) -> Array:
    """Return logits that depend on the row's tokens and task only; NaN for an unknown id."""
    content = (inputs["input_ids"] * inputs["attention_mask"]).sum(axis=1).astype(float)
    logits = np.full((len(content), WIDEST), np.nan)
    for row, task in enumerate(inputs["task_ids"]):
        if 0 <= task < len(TASKS):
            columns = np.arange(WIDEST)
            values = 3 * np.sin(content[row] * (columns + 1) + 2.0 * task)
            logits[row] = np.where(columns < WIDTHS[task], values, -np.inf)
    return logits


class FakeRunner:
    """A runner that answers by a function, and records what it was asked."""

    def __init__(
        self, answer: Answer, *, name: str = "fake", refuses: MtlExportError | None = None
    ) -> None:
        self.name = name
        self._answer = answer
        self._refuses = refuses
        self.asked: list[Mapping[str, Array]] = []
        self.is_open = False

    def __enter__(self) -> FakeRunner:
        """Open, or refuse."""
        if self._refuses:
            raise self._refuses
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.is_open = False

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one batch."""
        assert self.is_open
        self.asked.append(inputs)
        return self._answer(inputs)


def oracle(dtype: str) -> FakeRunner:
    """Return the oracle, off by a known error in each dtype."""
    return FakeRunner(lambda inputs: {"logits": exact(inputs) + ERROR[dtype]})


@pytest.fixture
def bound(tmp_path: Path) -> BoundModel:
    """Return three tasks of widths 2, 4 and 1 on a base that is one small file."""
    model = marked.bound()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    adapters = replace(model.adapters, checkpoint_sha256="c" * 64)
    return replace(model, base=replace(model.base, weight_files=(file,)), adapters=adapters)


@pytest.fixture
def cases() -> list[Case]:
    """Return the usual cases of seeded rows."""
    rows = seeded_rows(
        task_count=3, vocabulary=31, names=("input_ids", "attention_mask"), per_task=5
    )
    return build_cases(rows, task_count=3, vocabulary=31, longest=40)


def single(bound: BoundModel, answer: Answer, dtype: str = "fp32") -> Artefact:
    """Return a single graph that answers so."""
    return Artefact(
        name="single graph", kind="single-graph", runner=FakeRunner(answer), task=None,
        dtype=dtype, checkpoint_sha256=bound.adapters.checkpoint_sha256,
        base_sha256=bound.base.sha256,
    )  # fmt: skip


def merged(bound: BoundModel, task_index: int, answer: Answer) -> Artefact:
    """Return a merged artefact that answers so."""
    return replace(single(bound, answer), name="merged", kind="merged", task=TASKS[task_index])


def right(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Answer as a correct single graph does: off by less than twice the floor."""
    return {"logits": exact(inputs) + 1.5e-6}


def right_for(task_index: int) -> Answer:
    """Return the answers of a correct merged artefact."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert "task_ids" not in inputs
        ids = np.full(len(inputs["input_ids"]), task_index)
        return {"logits": exact({**inputs, "task_ids": ids})[:, : WIDTHS[task_index]] + 1.5e-6}

    return answer


def judge(
    bound: BoundModel,
    cases: list[Case],
    *artefacts: Artefact,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """Return the report on these artefacts."""
    return run_parity(bound, artefacts, cases, tolerance=tolerance or Tolerance(), oracle=oracle)


def failed(report: ParityReport) -> list[Cell]:
    """Return the cells that failed."""
    return [cell for cell in report.cells if cell.verdict == "failed"]


def changed(change: Callable[[Array, Array], object]) -> Answer:
    """Return a right single graph whose logits ``change(logits, task_ids)`` spoils in place."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        change(logits, inputs["task_ids"])
        return {"logits": logits}

    return answer


def test_right_artefacts_pass_in_every_case_for_every_task(
    bound: BoundModel, cases: list[Case]
) -> None:
    """Each case has one cell per task in it; a single graph is also asked bad ids."""
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
    assert {(c.artefact, c.task, c.case) for c in report.cells} == expected
    assert len(report.cells) == len(expected)
    for cell in report.cells:
        if cell.task != "*":
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
    run_parity(bound, artefacts, cases, tolerance=Tolerance(), oracle=oracle, progress=steps.append)
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
        if fault == "padding":
            logits[is_padding & (inputs["task_ids"] >= 0)[:, None]] = 77.0
        if fault == "token":
            logits[:, 0, 5] += 0.5
        if fault == "nan":
            logits[:, 0, 5] = np.nan
        return {"logits": logits[:, :-1] if fault == "shape" else logits}

    report = run_parity(
        model, [single(model, answer)], cases, tolerance=Tolerance(),
        oracle=lambda dtype: FakeRunner(lambda i: {"logits": tokens(i) + ERROR[dtype]}),
    )  # fmt: skip
    by_case = [cell for cell in report.cells if cell.case != "bad task ids"]
    assert {cell.verdict for cell in by_case} == {verdict}


def broken(case: str) -> Answer:
    """Return a single graph with one fault."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        ids = inputs["task_ids"]
        faults: dict[str, Callable[[], Array]] = {
            "renamed": lambda: logits,
            "fewer rows": lambda: logits[:1],
            "more rows": lambda: np.concatenate([logits, logits]),
            "frozen batch": lambda: np.resize(logits, (3, WIDEST)),
            "narrower": lambda: logits[:, :-1],
            "wider": lambda: np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf),
            "transposed": lambda: logits.T.copy(),
            "flat": lambda: logits.ravel(),
            "one more dimension": lambda: logits[:, None],
            "nan": lambda: np.where(np.arange(WIDEST) == 0, np.nan, logits),
            "inf": lambda: np.where(np.arange(WIDEST) == 0, np.inf, logits),
            "-inf": lambda: np.where(np.arange(WIDEST) == 0, -np.inf, logits),
            "all nan": lambda: np.full_like(logits, np.nan),
            "no label answers": lambda: np.where(np.isneginf(logits), 0.0, logits),
            "no label nan": lambda: np.where(np.isneginf(logits), np.nan, logits),
            "no label +inf": lambda: np.where(np.isneginf(logits), np.inf, logits),
            "no label very low": lambda: np.where(np.isneginf(logits), -1e30, logits),
            "tasks swapped": lambda: exact({**inputs, "task_ids": (ids + 1) % 3}),
            "first id for all": lambda: exact({**inputs, "task_ids": np.resize(ids[:1], len(ids))}),
            "routing frozen": lambda: exact({**inputs, "task_ids": np.arange(len(ids)) % 3}),
            "rows swapped": lambda: logits[::-1],
            "zeros": lambda: np.where(np.isfinite(logits), 0.0, logits),
        }
        return {"scores" if case == "renamed" else "logits": faults[case]()}

    return answer


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("renamed", "no output 'logits'"),
        ("fewer rows", "has shape [1, 4]"),
        ("more rows", "has shape"),
        ("frozen batch", "has shape [3, 4]"),
        ("narrower", "3], not"),
        ("wider", "5], not"),
        ("transposed", "has shape [4, "),
        ("flat", "has shape"),
        ("one more dimension", "1, 4], not"),
        ("nan", "values are NaN or Inf"),
        ("inf", "values are NaN or Inf"),
        ("-inf", "values are NaN or Inf"),
        ("all nan", "columns 2 and up answer"),
        ("no label answers", "columns 2 and up answer, but the task has 2 labels"),
        ("no label nan", "columns 2 and up answer"),
        ("no label +inf", "columns 1 and up answer"),
        ("no label very low", "columns 1 and up answer"),
        ("tasks swapped", ""),
        ("first id for all", ""),
        ("routing frozen", ""),
        ("rows swapped", "error"),
        ("zeros", "error"),
    ],
)
def test_a_broken_single_graph_fails(
    bound: BoundModel, cases: list[Case], fault: str, reason: str
) -> None:
    """No fault of shape, value, column or routing passes, even under the widest tolerance."""
    report = judge(bound, cases, single(bound, broken(fault)))
    assert report.verdict == "failed"
    assert any(reason in cell.reason for cell in failed(report))
    assert all(cell.reason for cell in failed(report))
    if reason not in ("", "error"):
        wide = Tolerance(atol=1e9, rtol=1e9)
        report = judge(bound, cases, single(bound, broken(fault)), tolerance=wide)
        assert any(reason in cell.reason for cell in failed(report))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda inputs: {}, "no output 'logits'"),
        (lambda inputs: {"logits": right_for(0)(inputs)["logits"][:1]}, "has shape [1, 2]"),
        (
            lambda inputs: {
                "logits": np.pad(
                    right_for(0)(inputs)["logits"], ((0, 0), (0, 2)), constant_values=-np.inf
                )
            },
            "4], not",
        ),
        (lambda inputs: {"logits": right_for(0)(inputs)["logits"] * np.nan}, "NaN or Inf"),
        (lambda inputs: {"logits": right_for(1)(inputs)["logits"][:, :2]}, "error"),
    ],
    ids=["no output", "frozen batch", "widest width", "nan", "another task"],
)
def test_a_broken_merged_artefact_fails(
    bound: BoundModel, cases: list[Case], answer: Answer, reason: str
) -> None:
    """A merged artefact must have its own task's numbers, width and rows."""
    report = judge(bound, cases, merged(bound, 0, answer))
    assert report.verdict == "failed"
    assert any(reason in cell.reason for cell in failed(report))


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("checkpoint_sha256", "d" * 64, "checkpoint"),
        ("checkpoint_sha256", "", "checkpoint"),
        ("base_sha256", "d" * 64, "base"),
        ("base_sha256", "", "base"),
    ],
)
def test_a_stale_artefact_fails_without_being_run(
    bound: BoundModel, cases: list[Case], field: str, value: str, word: str
) -> None:
    """What was made from another checkpoint or base fails even if its numbers agree."""
    artefact = single(bound, right)
    stale = replace(
        artefact,
        checkpoint_sha256=value if field == "checkpoint_sha256" else artefact.checkpoint_sha256,
        base_sha256=value if field == "base_sha256" else artefact.base_sha256,
    )
    report = judge(bound, cases, stale)
    (cell,) = report.cells
    assert report.verdict == cell.verdict == "failed"
    assert f"not from this {word}" in cell.reason
    assert (value[:12] or "an unknown one") in cell.reason
    assert isinstance(stale.runner, FakeRunner)
    assert not stale.runner.asked


def missing() -> BackendMissingError:
    """Return the error of a backend that is not there."""
    return BackendMissingError(where="tensorrt", found="no GPU", expected="one", fix="Get one")


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
    error = EngineRunError(where="model.onnx", found="broken", expected="whole", fix="Export")

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


def on_bad_ids(change: Callable[[Array, Array], Array]) -> Answer:
    """Return a right graph that ``change(logits, task_ids)`` spoils when an id is unknown."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits, ids = right(inputs)["logits"], inputs["task_ids"]
        is_bad = (ids < 0) | (ids >= len(TASKS))
        return {"logits": change(logits, ids) if is_bad.any() else logits}

    return answer


def refuse_all(logits: Array, ids: Array) -> Array:
    """Refuse the batch as a host-side check does."""
    raise EngineRunError(where="task_ids", found="9", expected="0 to 2", fix="Correct it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # TensorRT's Gather gives zeros, so the base model answers.
        (lambda logits, ids: np.nan_to_num(logits, nan=0.5), "are answered"),
        # An id that wraps to 1 in 32 bits is answered, the others are not.
        (
            lambda logits, ids: np.where((ids == 2**32 + 1)[:, None], 0.25, logits),
            f"ids [{2**32 + 1}] are answered",
        ),
        # T itself: the guard is off by one.
        (lambda logits, ids: np.where((ids == 3)[:, None], 0.25, logits), "ids [3] are answered"),
        (lambda logits, ids: np.where((ids == -1)[:, None], 0.25, logits), "ids [-1] are answered"),
        # One column of a bad row looks like an answer.
        (
            lambda logits, ids: np.where(np.arange(WIDEST) == 2, 0.25, logits),
            "are answered",
        ),
        (lambda logits, ids: logits * np.nan, "spoil the good row"),
        (lambda logits, ids: logits[:1], "has shape [1, 4], not [5, 4]"),
        (lambda logits, ids: logits[:, :1], "has shape [5, 1], not [5, 4]"),
    ],
    ids=["base answers", "32 bits", "off by one", "negative", "one column", "spoilt", "rows",
         "columns"],
)  # fmt: skip
def test_bad_task_ids_must_not_be_answered(
    bound: BoundModel, cases: list[Case], change: Callable[[Array, Array], Array], reason: str
) -> None:
    """A row with an unknown id that looks like an answer fails the single graph."""
    assert set(BAD_IDS) == {-1, 2**32 + 1, 2**63 - 1}
    report = judge(bound, cases, single(bound, on_bad_ids(change)))
    (cell,) = failed(report)
    assert cell.case == "bad task ids"
    assert reason in cell.reason


def test_refusing_bad_task_ids_is_as_good(bound: BoundModel, cases: list[Case]) -> None:
    """A runner that refuses the whole batch never answers a bad id."""
    assert judge(bound, cases, single(bound, on_bad_ids(refuse_all))).verdict == "passed"


def test_no_output_for_bad_ids_fails(bound: BoundModel, cases: list[Case]) -> None:
    """An output that is missing there is missing."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {} if (inputs["task_ids"] < 0).any() else right(inputs)

    (cell,) = failed(judge(bound, cases, single(bound, answer)))
    assert cell.reason == "logits is missing, not [5, 4]"


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_oracle_that_is_not_finite_compares_nothing(
    bound: BoundModel, cases: list[Case], dtype: str, bad: float
) -> None:
    """NaN or Inf in the reference or its floor would let anything pass: an error instead."""

    def spoilt(asked: str) -> FakeRunner:
        def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
            logits = exact(inputs) + ERROR[asked]
            if asked == dtype:
                logits[inputs["task_ids"] == 1, 2] = bad
            return {"logits": logits}

        return FakeRunner(answer)

    with pytest.raises(ParityError) as caught:
        run_parity(bound, [single(bound, right)], cases, tolerance=Tolerance(), oracle=spoilt)
    assert dtype in caught.value.where
    assert "task b" in caught.value.where
    assert "NaN or Inf" in caught.value.found
    assert caught.value.fix


def test_what_is_not_there_is_reported(bound: BoundModel, cases: list[Case]) -> None:
    """Artefacts that do not exist are cells too, and pass nothing."""
    absent = Cell("engine", "tensorrt", "*", "*", "not-run", "not built")
    report = run_parity(bound, [], cases, tolerance=Tolerance(), oracle=oracle, not_there=[absent])
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
    assert [len(asked["input_ids"]) for asked in artefact.runner.asked] == [c for c in counts if c]
    assert all("task_ids" not in asked for asked in artefact.runner.asked)
