from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.runtime import TaskSession
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


def test_a_language_model_from_export_to_parity(project: Path, run: Run) -> None:
    """Two graphs that share one data file; parity compares prompts, steps and tokens of all."""
    outcome = run("onnx", "--all-tasks")
    assert outcome.code == 0, outcome.stderr
    assert files_below(project / "out" / "onnx") == [
        "config.json", "decode.onnx", "generation_config.json", "model.onnx.data",
        "mtl-export.json", "prefill.onnx",
    ]  # fmt: skip
    assert run("merge", "--task", TASKS[0]).code == 0
    words = ("--json", "--atol", "1e-4", "--rtol", "0", "--threads", "1", "--golden")
    outcome = run("parity", *words)
    assert outcome.code == 0, outcome.stdout
    replayed = run("verify", "out", "--require-run", "--json")
    assert replayed.code == 0, replayed.stdout
    steps = "prefill.onnx, steps from the cache"
    assert steps in {one["what"] for one in replayed.json["checks"] if one["verdict"] == "passed"}
    found = {
        (cell["artefact"], cell["case"], cell["task"])
        for cell in outcome.json["cells"]
        if cell["verdict"] == "passed"
    }
    for task in TASKS:
        for case in ("mixed tasks", "8 steps, mixed tasks", "8 tokens, mixed tasks"):
            assert ("single graph onnx", case, task) in found
    assert ("single graph onnx", "bad task ids, step", "*") in found
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
    said = f"single graph onnx, task {TASKS[1]}: {layer} is wrong: the adapter of task {TASKS[0]}"
    assert said in outcome.stdout


def test_engines_of_a_language_model_are_refused(project: Path, run: Run) -> None:
    """The class, the reason and what to do instead; nothing is written."""
    outcome = run("trt", "--all-tasks")
    assert outcome.code == 6
    for part in ("LlamaForCausalLM", "hand on keys and values", "mtl-export onnx"):
        assert part in outcome.stderr
    assert not (project / "out").exists()
