from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mtl_export.errors import UsageError
from mtl_export.names import QUANTISATION_KEY
from mtl_export_calibration import modelopt
from mtl_export_calibration.formats import format_named
from mtl_export_calibration.targets import refuse_parts
from tests.cli.conftest import Run, files_below
from tests.factories import TASKS, WORDS
from tests.graph import marked
from tests.graph.constants import short_constants_below
from tests.graph.mixed_heads import NAMES as MIXED
from tests.graph.mixed_heads import write_mixed

FILES = (
    "calibration.json", "config.json", "model.onnx", "model.onnx.data", "mtl-export.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
HEADED = tuple(name for name in MIXED if name != "states")
# The toy's weights are random and its margins narrow: what is tested is not its accuracy.
LOOSE = ("--max-drop", "100", "--threads", "1", "--data", "rows.jsonl")


@pytest.fixture
def rows(exported: Path) -> Path:
    """Give the exported project with a few rows of every task."""
    words = [word for word in WORDS if word.isalpha()]
    lines = [
        {"task": task.name, "text": f"{word} {words[(place + 3) % len(words)]} night"}
        for task in TASKS
        for place, word in enumerate(words[: 12 - task.index])
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (exported / "rows.jsonl").write_text(text, encoding="utf-8")
    return exported


def test_every_exported_graph_is_quantised(rows: Path, run: Run) -> None:
    """The single graph and each task's, beside one another, judged per task."""
    outcome = run("calibrate", *LOOSE)
    assert outcome.code == 0, outcome.stderr
    folders = ["", *(f"{task.name}/" for task in TASKS)]
    assert files_below(rows / "out" / "onnx-int8") == sorted(f + n for f in folders for n in FILES)
    table = outcome.stdout.splitlines()
    assert table[0] == "int8, percentile; the worst task may lose 100 points"
    for task in TASKS:
        assert sum(f" {task.name} " in line and "passed" in line for line in table) == 2
    assert sum("ONNX Runtime, 8 x 40: fp32" in line for line in table) == 4


def test_constants_of_quantised_graphs_are_tensors(rows: Path, run: Run) -> None:
    """As of the graphs they were made from: the single one and each task's."""
    assert run("calibrate", *LOOSE, "--layout", "both").code == 0
    assert short_constants_below(rows / "out") == []


def test_the_same_call_again_finds_it_done(rows: Path, run: Run) -> None:
    """Nothing is measured or written twice; other options are refused without --force."""
    words = ("calibrate", *LOOSE, "--layout", "single-graph")
    first = run(*words, "--json").json
    again = run(*words, "--json").json
    assert first["ok"]
    assert again["ok"]
    assert again["graphs"][0]["output"]["status"] == "up to date"
    for graph in (*first["graphs"], *again["graphs"]):
        del graph["output"], graph["latency_ms"]
    assert again == first
    assert first["graphs"][0]["data"]["rows"]["topic"] == {
        "available": 11,
        "judged": 11,
        "used": 11,
    }
    other = run(*words, "--method", "max")
    assert other.code == 2
    assert "method was 'percentile', is 'max'" in other.stderr
    assert run(*words, "--method", "max", "--force").code == 0


def test_what_is_written_again_has_the_same_bytes(rows: Path, run: Run) -> None:
    """Whether ranges and trials are measured anew or found in the cache, which is checked too."""
    words = ("calibrate", *LOOSE, "--layout", "per-task")
    folder, kept = rows / "out" / "onnx-int8", []
    for _ in range(2):  # of the second, all but the files is in the cache
        assert run(*words).code == 0
        kept.append({name: (folder / name).read_bytes() for name in files_below(folder)})
        shutil.rmtree(folder)
    assert kept[0] == kept[1]
    assert run("verify", "out").code == 0
    (rows / "out" / "calibration" / "task-spam.int8.ranges.json").write_text("{}")
    assert run("verify", "out").code == 7


def test_a_task_that_loses_too_much_fails_the_gate(rows: Path, run: Run) -> None:
    """Exit code 4, and nothing is written that an engine could be built from."""
    words = ("--layout", "single-graph", "--combine", "weighted", "--method", "max")
    wrong = ("--weight", "topic=0", "--weight", "spam=0", "--max-excluded", "0")
    outcome = run("calibrate", *LOOSE[2:], *words, *wrong, "--max-drop", "0", "--quantize", "fp8")
    assert outcome.code == 4
    assert "FAILED" in outcome.stdout
    assert "not written, because a task does not pass" in outcome.stdout
    assert "try --max-excluded to leave more layers unquantised" in outcome.stdout
    assert "--quantize" not in outcome.stdout  # no format costs less than fp8
    assert not (rows / "out" / "onnx-fp8").exists()


def test_golden_vectors_of_the_float_graph_are_not_the_quantised_ones(rows: Path, run: Run) -> None:
    """They would fail verify, though the quantised graph is what it should be."""
    (rows / "out" / "onnx" / "spam" / "golden.npz").write_bytes(b"the float graph's answers")
    words = ("--layout", "per-task", "--exclude", "attention", "-o", "quantised")
    assert run("calibrate", *LOOSE, *words).code == 0
    assert files_below(rows / "quantised" / "spam") == sorted(FILES)


def test_graphs_of_another_checkpoint_are_refused(rows: Path, run: Run) -> None:
    """Whoever trained on and did not export again is told to; nothing is relabelled."""
    file = rows / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "np") as stored:
        metadata = stored.metadata()
    save_file({name: value * 1.5 for name, value in tensors.items()}, file, metadata=metadata)
    for layout, again in (
        ("both", "mtl-export onnx --all-tasks --force"),
        ("per-task", "mtl-export onnx --all-tasks --layout per-task --force"),
    ):
        outcome = run("calibrate", *LOOSE, "--layout", layout, "--onnx", "out/onnx")
        assert outcome.code == 2, outcome.stdout
        assert "made from checkpoint " in outcome.stderr
        assert f"Export it again: {again}" in outcome.stderr
    assert not (rows / "out" / "onnx-int8").exists()


def test_graphs_of_some_layers(rows: Path, run: Run) -> None:
    """Layers that match are kept, and what was kept is said."""
    words = ("--layout", "per-task", "--exclude", "attention", "--json", "-o", "quantised")
    graphs = run("calibrate", *LOOSE, *words).json["graphs"]
    assert [graph["graph"] for graph in graphs] == [task.name for task in TASKS]
    assert all(len(graph["layers"]) == 4 for graph in graphs)
    assert not any("attention" in name for graph in graphs for name in graph["layers"])
    assert (rows / "quantised" / "topic" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "no calibration data was given"),
        (("--data", "nowhere.jsonl"), "it cannot be read"),
        (("--data", "rows.jsonl", "--onnx", "elsewhere"), "Run mtl-export onnx --all-tasks first"),
        (("--data", "rows.jsonl", "--weight", "spma=2"), "Did you mean --task spam"),
        (("--data", "rows.jsonl", "--weight", "spam"), "is not NAME=NUMBER"),
        (("--data", "rows.jsonl", "--weight", "spam=inf"), "a weight is finite"),
        (("--data", "rows.jsonl", "--max-drop", "nan"), "'nan' is no finite number"),
        (("--data", "rows.jsonl", "--max-drop", "inf"), "'inf' is no finite number"),
        (("--data", "rows.jsonl", "--max-cut", "nan"), "'nan' is no finite number"),
        (("--data", "rows.jsonl", "--max-excluded", "nan"), "'nan' is no finite number"),
        (("--data", "rows.jsonl", "--exclude", "nothing"), "found in no layer's name"),
        (("--data", "rows.jsonl", "--quantize", "int4"), "no multiple of 64"),
        (("--data", "rows.jsonl", "--engine", "modelopt", "--combine", "weighted"),
         "calibrators count every value once"),
        (("--data", "rows.jsonl", "--engine", "modelopt", "--quantize", "fp8", "--method",
          "entropy"), "Pass --method max"),
        (("--data", "rows.jsonl", "--layout", "single-graph", "--combine", "per-task"),
         "a graph that serves 3 tasks"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    rows: Path, run: Run, words: tuple[str, ...], reason: str
) -> None:
    """Exit code 2, with what to do."""
    outcome = run("calibrate", *words)
    assert outcome.code == 2
    assert reason in outcome.stderr


@pytest.mark.parametrize("is_typed", [True, False])
def test_an_engine_that_is_not_there_is_refused_before_any_work(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch, *, is_typed: bool
) -> None:
    """Exit code 6 with the extra to install; nothing is exported or measured."""
    monkeypatch.setattr(modelopt, "find_spec", lambda name: None)
    (project / "rows.jsonl").write_text("{}")
    if not is_typed:
        with (project / "mtl-export.toml").open("a") as file:
            file.write('[calibrate]\nengine = "modelopt"\n')
    words = ("--engine", "modelopt") if is_typed else ()
    outcome = run("calibrate", "--data", "rows.jsonl", *words)
    assert outcome.code == 6
    assert "pip install 'mtl-export[quant]'" in outcome.stderr
    assert not (project / "out").exists()


@pytest.mark.other_env
@pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_ranges_may_be_modelopts(rows: Path, run: Run, number: str) -> None:
    """They end up in Q and DQ; the report, the graph and the next call know whose they are."""
    words = (*LOOSE, "--layout", "single-graph", "--method", "percentile", "--quantize", number)
    outcome = run("calibrate", *words, "--engine", "modelopt")
    assert outcome.code == 0, outcome.stderr
    assert f"{number}, percentile by modelopt; the worst" in outcome.stdout
    folder = rows / "out" / f"onnx-{number}"
    theirs = json.loads((folder / "calibration.json").read_text())
    assert theirs["engine"] == "modelopt"
    model = onnx.load(folder / "model.onnx")
    about = json.loads({one.key: one.value for one in model.metadata_props}[QUANTISATION_KEY])
    assert about["engine"] == "modelopt"
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    scales = {
        node.input[0]: float(values[node.input[1]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in theirs["activations"]
    }
    largest = format_named(number).largest
    expected = {name: one["amax"] / largest for name, one in theirs["activations"].items()}
    assert scales == pytest.approx(expected, rel=1e-6)

    refused = run("calibrate", *words)
    assert refused.code == 2
    assert "engine was 'modelopt', is 'onnxruntime'" in refused.stderr
    assert run("calibrate", *words, "--force").code == 0
    ours = json.loads((folder / "calibration.json").read_text())["activations"]
    assert ours != theirs["activations"]
    for name, one in theirs["activations"].items():
        assert one["amax"] == pytest.approx(ours[name]["amax"], rel=0.01)


def test_a_graph_of_one_task_at_a_time_is_refused(rows: Path, run: Run) -> None:
    """Batches that mix tasks cannot be fed to it; the message says what can."""
    path = rows / "out" / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key="mtl_export.task_input", value="scalar")
    onnx.save(model, path)
    outcome = run("calibrate", *LOOSE)
    assert outcome.code == 2
    assert "--task-input rows" in outcome.stderr


@pytest.mark.parametrize("option", ["--data", "--judge"])
def test_data_that_are_not_there_are_told_before_any_work(
    rows: Path, run: Run, option: str
) -> None:
    """A misspelt file shall not cost the export of every graph."""
    shutil.rmtree(rows / "out")
    outcome = run("calibrate", "--data", "rows.jsonl", option, "nope.jsonl")
    assert outcome.code == 2
    assert "nope.jsonl" in outcome.stderr
    assert not (rows / "out").exists()


def test_what_was_not_exported_is_exported_first(rows: Path, run: Run) -> None:
    """Both layouts by default; graphs that are there are taken as they are."""
    graphs = rows / "out" / "onnx"
    (graphs / "topic").rename(rows / "topic")
    shutil.rmtree(graphs)
    graphs.mkdir()
    (rows / "topic").rename(graphs / "topic")
    kept = (graphs / "topic" / "model.onnx").read_bytes()
    outcome = run("calibrate", *LOOSE, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [graph["graph"] for graph in outcome.json["graphs"]] == [
        "single graph", *(task.name for task in TASKS),
    ]  # fmt: skip
    assert "onnx: single graph" in outcome.stderr
    assert "onnx: spam" in outcome.stderr
    assert "onnx: topic" not in outcome.stderr
    assert (graphs / "topic" / "model.onnx").read_bytes() == kept


def test_rows_of_one_task_under_all_names_fail_the_others(rows: Path, run: Run) -> None:
    """Whatever points may be lost: values beyond the ranges show that the rows are not theirs."""
    words = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    own = [row for row in words if row["task"] == "spam"]
    wrong = [{**row, "task": task.name, "text": "the"} for row in own for task in TASKS]
    text = "".join(json.dumps(row) + "\n" for row in wrong)
    (rows / "wrong.jsonl").write_text(text, encoding="utf-8")
    layout = ("--layout", "single-graph", "--method", "max")
    judged = ("--data", "wrong.jsonl", "--judge", "rows.jsonl")
    outcome = run("calibrate", *LOOSE[:4], *judged, *layout, "--json")
    assert outcome.code == 4
    (graph,) = outcome.json["graphs"]
    cuts = {name: task["cut"] for name, task in graph["tasks"].items()}
    assert all(cut["share"] > cut["allowed"] for cut in cuts.values())
    assert not (rows / "out" / "onnx-int8").exists()
    allowed = run("calibrate", *LOOSE[:4], *judged, *layout, "--max-cut", "10000")
    assert allowed.code == 0, allowed.stdout


def test_a_model_that_generates_is_refused_before_any_work() -> None:
    """Its graphs hand on keys and values: no one run says what quantising costs."""
    bound = marked.bound()
    bound = replace(bound, adapters=replace(bound.adapters, model_class="LlamaForCausalLM"))
    with pytest.raises(UsageError, match="generates tokens"):
        refuse_parts(bound, "both")


@pytest.mark.parametrize(
    ("layouts", "tasks", "reason"),
    [
        ((), MIXED, "task states: it has no head"),
        (("--layout", "per-task"), MIXED, "task states: it has no head"),
        ((), HEADED, "Pass --layout per-task: each task's own graph has logits"),
        (("--layout", "single-graph"), HEADED, "they differ in kind: classification, regression,"),
    ],
)
def test_heads_of_several_kinds_are_refused_before_any_work(
    project: Path, run: Run, layouts: tuple[str, ...], tasks: tuple[str, ...], reason: str
) -> None:
    """No output tells what quantising costs all tasks; nothing is exported or measured."""
    write_mixed(project / "mixed", names=tasks)
    (project / "rows.jsonl").write_text("{}")
    outcome = run("calibrate", "-c", "mixed", "--data", "rows.jsonl", *layouts)
    assert outcome.code == 2
    assert reason in outcome.stderr
    assert not (project / "out").exists()


def test_each_graph_of_heads_of_several_kinds_is_quantised(project: Path, run: Run) -> None:
    """Alone in its graph a task answers with logits, for a row or for each of its tokens."""
    tasks = ("score", "entities")
    write_mixed(project / "mixed", names=tasks)
    lines = [{"task": name, "text": f"{word} night"} for name in tasks for word in WORDS[-9:]]
    (project / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = run("calibrate", "-c", "mixed", *LOOSE, "--layout", "per-task", "--json")
    assert outcome.code == 0, outcome.stderr
    assert [graph["graph"] for graph in outcome.json["graphs"]] == list(tasks)


def test_a_graph_without_logits_is_refused_before_it_is_measured(rows: Path, run: Run) -> None:
    """As one exported elsewhere, or of a model without heads."""
    path = rows / "out" / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].name = "scores"
    model.graph.node.add(op_type="Identity", input=["logits"], output=["scores"])
    onnx.save(model, path)
    outcome = run("calibrate", *LOOSE)
    assert outcome.code == 2
    assert "outputs scores. Expected an output logits" in outcome.stderr
    assert not (rows / "out" / "calibration").exists()


def test_the_file_may_say_it_all(rows: Path, run: Run) -> None:
    """[calibrate] holds the options; data are found beside the file, from any folder."""
    (rows / "made.py").write_text(
        "import json, pathlib\n"
        "def rows():\n"
        "    text = (pathlib.Path(__file__).parent / 'rows.jsonl').read_text()\n"
        "    return map(json.loads, text.splitlines())\n"
    )
    with (rows / "mtl-export.toml").open("a") as file:
        file.write(
            '[calibrate]\ndata = "made.py:rows"\njudge = "rows.jsonl"\nmax_drop = 100\n'
            'layout = "single-graph"\nthreads = 1\ncombine = "weighted"\nweight = { spam = 2 }\n'
        )
    outcome = run("calibrate", "--config", str(rows / "mtl-export.toml"), "--json")
    assert outcome.code == 0, outcome.stderr
    (graph,) = outcome.json["graphs"]
    assert (graph["combine"], graph["gate"]["max_drop"]) == ("weighted", 100.0)
