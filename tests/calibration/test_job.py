"""The whole work on one graph: what passes is written, what fails is seen and is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import mtl_export_calibration.job as job_module
import mtl_export_calibration.measure as measure_module
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.data.samples import Samples
from mtl_export.errors import CalibrationError
from mtl_export.graph.passes.merge_task import MergeTaskPass
from mtl_export.runtime.ort import OrtRunner, onnx_metadata
from mtl_export_calibration.evaluate import answers
from mtl_export_calibration.formats import FP8, INT4, INT8
from mtl_export_calibration.job import GraphJob
from mtl_export_calibration.measure import ExportedGraph, Options, Work, measure
from mtl_export_calibration.report import GraphReport
from tests.calibration import toys
from tests.graph import marked

OPTIONS = Options(INT8, "max", max_drop=5.0, max_excluded=0.0, threads=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the float graph's folder."""
    return toys.write_graph(tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def judged(source: Path) -> Samples:
    """Give rows that the float graph is sure of, labelled with what it says."""
    rows = toys.samples(400, seed=1)
    found = answers(source / "model.onnx", rows, threads=1)
    logits = np.stack([found[0].logits, found[1].logits], axis=1).reshape(-1, 3)
    ordered = np.sort(logits, axis=1)
    margin = (ordered[:, -1] - ordered[:, -2]) / ordered.std()
    labelled = Samples(rows.arrays, rows.task_ids, logits.argmax(axis=1))
    return labelled.take(np.flatnonzero(margin > np.where(rows.task_ids == 1, 0.3, 0.05)))


def work(source: Path, judged: Samples, cache: Path, options: Options = OPTIONS) -> Work:
    """Return the work on the toy's single graph."""
    target = ExportedGraph(source, None)
    return Work(toys.bound(), (target,), toys.samples(64), judged, options, cache)


def run(work: Work, folder: Path) -> GraphReport:
    """Do the work on its one graph."""
    folder.mkdir(exist_ok=True)
    target = work.targets[0]
    return GraphJob(work, target, measure(work)[target.name], {}, folder).run()


def test_a_good_calibration_passes_and_is_written(
    source: Path, judged: Samples, tmp_path: Path
) -> None:
    """Both tasks keep their accuracy; the folder is a whole bundle that says what it is."""
    report = run(work(source, judged, tmp_path / "cache"), tmp_path / "out")
    assert report.passed
    assert [score.task for score in report.scores] == ["quiet", "loud"]
    assert all(score.float_accuracy == 1.0 and score.labelled > 50 for score in report.scores)
    assert all(score.sqnr_db > 15 for score in report.scores)
    # The quiet task pays for the loud one's range, and the report says how much.
    assert report.measured.inflation("quiet")[0] > 4
    assert report.measured.inflation("loud")[0] == 1.0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "calibration.json", "config.json", "model.onnx", "model.onnx.data",
    ]  # fmt: skip
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert written["tasks"]["quiet"]["inflation"]["factor"] > 4
    assert written["gate"] == {
        "max_cut": 3.0, "max_drop": 5.0, "passed": True, "trials": 1,
        "worst_drop": report.worst_drop,
    }  # fmt: skip
    about = json.loads(onnx_metadata(tmp_path / "out" / "model.onnx")["mtl_export.quantisation"])
    assert (about["format"], about["layers"], about["excluded"]) == ("int8", 2, [])
    with OrtRunner(tmp_path / "out" / "model.onnx", threads=1) as runner:
        assert runner.infer({**judged.arrays, "task_ids": judged.task_ids})["logits"].shape[1] == 3


def test_one_tasks_ranges_fail_the_other(source: Path, judged: Samples, tmp_path: Path) -> None:
    """Weights of one task only: the other's values are cut, which is seen and does not pass."""
    options = replace(OPTIONS, combine="weighted", weights={"loud": 0.0})
    report = run(work(source, judged, tmp_path / "cache", options), tmp_path / "out")
    quiet, loud = report.scores
    assert quiet.drop <= 5.0 < loud.drop
    assert not report.passed
    assert report.measured.inflation("loud")[0] < 0.5
    assert report.measured.cut["loud"].share > 0.1 > report.measured.cut["quiet"].share
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_one_tasks_rows_under_both_names_fail_the_other(
    source: Path, judged: Samples, tmp_path: Path
) -> None:
    """Rows of the quiet task that claim to be loud fool the ranges, not the judged rows."""
    rows = toys.samples(64)
    quiet = rows.of_task(0)
    doubled = quiet.take(np.arange(128) // 2)
    wrong = Samples(doubled.arrays, np.arange(128) % 2, doubled.labels)
    fooled = replace(work(source, judged, tmp_path / "cache"), calibration=wrong)
    report = run(fooled, tmp_path / "out")
    assert report.measured.inflation("loud")[0] == pytest.approx(1.0, abs=0.2)
    assert report.measured.cut["loud"].share > 0.1
    assert [score.drop > 5.0 for score in report.scores] == [False, True]
    # Seen in the values too, whatever the accuracy is.
    patient = replace(fooled, options=replace(OPTIONS, max_drop=100.0))
    report = run(patient, tmp_path / "patient")
    assert not report.passed
    quiet_failure, loud_failure = map(report.failure, report.scores)
    assert not quiet_failure
    assert "lie beyond the range" in loud_failure
    assert report.trials == 1


def with_outlier(tmp_path: Path) -> Path:
    """Return a graph whose first input has a feature that is huge and that nothing reads."""
    return toys.write_graph(tmp_path / "outlier", outlier=3000.0)


def test_only_the_layer_to_blame_is_left_out(judged: Samples, tmp_path: Path) -> None:
    """The outlier takes all steps of the first layer; without it the rest passes."""
    options = replace(OPTIONS, max_excluded=0.5)
    report = run(
        work(with_outlier(tmp_path), judged, tmp_path / "cache", options), tmp_path / "out"
    )
    assert report.passed
    assert report.excluded == ("first",)
    assert report.trials >= 2
    assert report.measured.worst_layer("quiet")[1] == "first"
    about = json.loads(onnx_metadata(tmp_path / "out" / "model.onnx")["mtl_export.quantisation"])
    assert (about["layers"], about["excluded"]) == (1, ["first"])


def test_a_killed_search_goes_on(
    judged: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges and finished trials are not done again; the result is the same."""
    options = replace(OPTIONS, max_excluded=0.5)
    todo = work(with_outlier(tmp_path), judged, tmp_path / "cache", options)
    tried: list[GraphJob] = []

    def killed(order: Any, trial: Any, **limits: Any) -> Any:
        trial(frozenset())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "smallest_exclusion", killed)
        with pytest.raises(KeyboardInterrupt):
            run(todo, tmp_path / "out")

    def refuse(*_: object) -> None:
        raise AssertionError("ranges are measured again")

    monkeypatch.setattr(measure_module, "engine_named", refuse)
    judge = GraphJob._judge

    def counted(self: GraphJob) -> Any:
        tried.append(self)
        return judge(self)

    monkeypatch.setattr(GraphJob, "_judge", counted)
    resumed = run(todo, tmp_path / "out")
    assert resumed.excluded == ("first",)
    assert len(tried) == resumed.trials - 1
    again = run(todo, tmp_path / "again")
    assert len(tried) == resumed.trials - 1
    assert again.as_dict() == resumed.as_dict()
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (
        tmp_path / "out" / "model.onnx"
    ).read_bytes()


def test_other_data_are_measured_again(source: Path, judged: Samples, tmp_path: Path) -> None:
    """A cache of other rows, or of another method, is no answer."""
    first = measure(work(source, judged, tmp_path / "cache"))["single graph"]
    kept = measure(work(source, judged, tmp_path / "cache"))["single graph"]
    assert kept == first
    other = replace(work(source, judged, tmp_path / "cache"), calibration=toys.samples(64, seed=9))
    assert measure(other)["single graph"].amax != first.amax
    method = work(source, judged, tmp_path / "cache", replace(OPTIONS, method="mse"))
    assert measure(method)["single graph"].amax != first.amax


@pytest.mark.parametrize("number", [FP8, INT4], ids=lambda number: number.name)
def test_other_formats_pass_too(number: Any, source: Path, judged: Samples, tmp_path: Path) -> None:
    """8-bit floats, and 4-bit weights with float activations."""
    options = replace(OPTIONS, number=number, max_drop=12.0)
    report = run(work(source, judged, tmp_path / "cache", options), tmp_path / "out")
    assert report.passed
    assert report.number == number.name
    # Ranges that are not used cost nobody anything.
    assert (report.measured.inflation("quiet")[0] > 4) == number.quantises_activations
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_rows_that_weights_are_rounded_for_are_kept(
    source: Path, judged: Samples, tmp_path: Path
) -> None:
    """The same graph comes of a cache; without the rows it is measured again."""
    options = replace(OPTIONS, number=INT4, max_drop=12.0)
    one = work(source, judged, tmp_path / "cache", options)
    first = measure(one)["single graph"]
    assert {name: len(rows) >= 2 * 64 for name, rows in first.rows.items()} == {
        "e": True,
        "m": True,
    }
    run(one, tmp_path / "out")
    file = one.rows_file(one.targets[0])
    before = file.stat().st_mtime_ns
    run(one, tmp_path / "again")
    assert file.stat().st_mtime_ns == before
    graphs = [(tmp_path / folder / "model.onnx").read_bytes() for folder in ("out", "again")]
    assert graphs[0] == graphs[1]
    file.unlink()
    again = measure(one)["single graph"]
    assert file.is_file()
    assert all(np.array_equal(again.rows[name], rows) for name, rows in first.rows.items())


def test_merged_graphs_have_ranges_of_their_own(
    source: Path, judged: Samples, tmp_path: Path
) -> None:
    """Per task by default, all together if asked, which needs the graphs of all tasks."""
    targets = tuple(ExportedGraph(source, task) for task in toys.TASKS)
    both = replace(work(source, judged, tmp_path / "cache"), targets=targets)
    own = measure(both)
    assert own["quiet"].amax["e"] < own["loud"].amax["e"] / 4
    union = replace(both, options=replace(OPTIONS, combine="union"))
    joined = measure(union)
    assert joined["quiet"].amax == joined["loud"].amax
    assert joined["quiet"].inflation("quiet")[0] > 4
    half = replace(union, targets=targets[:1], cache=tmp_path / "other")
    with pytest.raises(CalibrationError, match="no exported graph for loud"):
        measure(half)


def small_change(tmp_path: Path, options: Options) -> Work:
    """Return the work on a merged graph whose task changes almost nothing."""
    bound = marked.bound()
    layers = {
        name: replace(layer, core=layer.core * 1e-4)
        for name, layer in bound.adapters.layers.items()
        if isinstance(layer, LayerAdapter)
    }
    bound = replace(bound, adapters=replace(bound.adapters, layers=layers))
    task = marked.TASKS[1]
    ir.save(MergeTaskPass(bound, task)(marked.model()).model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(64, 3, 5)).astype(np.float32)
    rows = Samples({"x": x}, np.full(64, task.index), np.full(64, -1))
    return Work(bound, (ExportedGraph(tmp_path, task),), rows, rows, options, tmp_path / "cache")


def test_a_change_below_the_steps_is_added_in_float(tmp_path: Path) -> None:
    """Merged into the weight it would be rounded away: seen, and kept apart or left alone."""
    options = replace(OPTIONS, max_drop=30.0)
    report = run(small_change(tmp_path, options), tmp_path / "out")
    assert report.passed
    assert report.apart == ("enc.narrow", "enc.wide", "pool")
    assert all(by_task == {"b": 1.0} for by_task in report.measured.swallowed.values())
    names = {node.name for node in ir.load(tmp_path / "out" / "model.onnx").graph}
    assert {f"{name}/rest" for name in report.apart} < names
    merged = run(small_change(tmp_path, replace(options, deltas="merged")), tmp_path / "merged")
    assert merged.passed
    assert not merged.apart
    with pytest.raises(CalibrationError, match="larger than what the task changes"):
        run(small_change(tmp_path, replace(options, deltas="exclude")), tmp_path / "excluded")


def test_nothing_to_quantise_is_said(source: Path, judged: Samples, tmp_path: Path) -> None:
    """Excluding every layer leaves no work, which is no success."""
    todo = work(source, judged, tmp_path / "cache", replace(OPTIONS, exclude=("first", "second")))
    with pytest.raises(CalibrationError, match="no layer to quantise"):
        measure(todo)
