from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.runtime import TaskSession
from mtl_export.tensorrt import EngineManifest
from tests.cli.conftest import TOML, Run, files_below
from tests.graph import language

TASKS = [task.name for task in language.TASKS]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with a causal language model and its adapter, as the current folder."""
    language.language_bound(tmp_path, "LlamaForCausalLM")
    (tmp_path / "mtl-export.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _builds_engines(project: Path, run: Run) -> None:
    """Build an engine for each graph; all ranges of the cache agree with one another."""
    assert run("trt", "--all-tasks").code == 0
    assert files_below(project / "out" / "engines") == [
        "decode.engine", "decode.engine.json", "mtl-export.json", "prefill.engine",
        "prefill.engine.json",
    ]  # fmt: skip
    manifest = EngineManifest.read(project / "out" / "engines" / "decode.engine.json")
    shapes = manifest.profiles[0].shapes
    longest = language.POSITIONS - 1
    assert [shape[-1] for shape in shapes["attention_mask"]] == [2, longest + 1, longest + 1]
    assert [shape[2] for shape in shapes["past_key_values.1.value"]] == [1, longest, longest]


def test_a_language_model_from_export_to_parity(project: Path, run: Run) -> None:
    """Two graphs that share one data file; parity compares prompts, steps and tokens of all."""
    outcome = run("onnx", "--all-tasks")
    assert outcome.code == 0, outcome.stderr
    assert files_below(project / "out" / "onnx") == [
        "config.json", "decode.onnx", "generation_config.json", "model.onnx.data",
        "mtl-export.json", "prefill.onnx",
    ]  # fmt: skip
    assert run("merge", "--task", TASKS[0]).code == 0
    if find_spec("tensorrt_rtx") is not None:
        _builds_engines(project, run)
    words = ("--json", "--atol", "1e-4", "--rtol", "0", "--threads", "1", "--golden")
    outcome = run("parity", *words)
    assert outcome.code == 0, outcome.stdout
    replayed = run("verify", "out/onnx", "--require-run", "--json")
    assert replayed.code == 0, replayed.stdout
    steps = "prefill.onnx, steps from the cache"
    assert steps in {one["what"] for one in replayed.json["checks"] if one["verdict"] == "passed"}
    if find_spec("tensorrt_rtx") is not None:
        engine = [c for c in outcome.json["cells"] if c["artefact"] == "single-graph engine"]
        assert [(cell["verdict"], "have no runner" in cell["reason"]) for cell in engine] == [
            ("not-run", True)
        ]
    found = {
        (cell["artefact"], cell["case"], cell["task"])
        for cell in outcome.json["cells"]
        if cell["verdict"] == "passed"
    }
    for task in TASKS:
        for case in ("mixed tasks", "8 steps, mixed tasks", "8 tokens, mixed tasks"):
            assert ("single-graph onnx", case, task) in found
    assert ("single-graph onnx", "bad task ids, step", "*") in found
    assert ("merged pytorch", "8 tokens, mixed tasks", TASKS[0]) in found

    session = TaskSession(project / "out" / "onnx", threads=1)
    prompts = [[5, 9, 7, 30], [12, 4]]
    together = session.generate(prompts, [TASKS[1], TASKS[2]], max_new_tokens=5)
    alone = [
        session.generate([prompt], task, max_new_tokens=5)[0]
        for prompt, task in zip(prompts, TASKS[1:], strict=True)
    ]
    assert together == alone
    assert np.shape(together[0]) == (5,)
    _names_the_wrong_layer(project, run)


def _names_the_wrong_layer(project: Path, run: Run) -> None:
    """Give one task another's core in the prompts' graph; parity says so."""
    folder = project / "out" / "onnx"
    model = ir.load(folder / "prefill.onnx")
    stack = next(v for n, v in model.graph.initializers.items() if n.endswith("v_proj.core"))
    assert stack.const_value is not None
    values = stack.const_value.numpy().copy()
    values[1] = values[0]
    stack.const_value = ir.tensor(values, name=stack.name)
    (folder / "prefill.onnx").unlink()
    ir.save(model, folder / "prefill.onnx")
    # Without it the file is taken as it is.
    (folder / "mtl-export.json").unlink()
    outcome = run("parity", "--quick", "--threads", "1", "--merged", "out/onnx")
    assert outcome.code == 3
    layer = str(stack.name).removesuffix(".core")
    said = f"single-graph onnx, task {TASKS[1]}: {layer} is wrong: the adapter of task {TASKS[0]}"
    assert said in outcome.stdout


def test_quantised_engines_of_a_language_model_are_refused(project: Path, run: Run) -> None:
    """Calibrate could not write their graphs, so it is not what is asked for."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    outcome = run("trt", "--all-tasks", "--quantize", "int8")
    assert outcome.code == 2
    assert "LlamaForCausalLM generates tokens, by several graphs" in outcome.stderr
    assert "mtl-export calibrate" not in outcome.stderr
    assert not (project / "out").exists()
