"""The example's single graph in the tools that come next, in an environment of its own.

Opt-in: ``pytest -m other_env tests/environments/test_graph_tools.py``. It makes a virtual
environment and installs the tools there, unless GRAPH_TOOLS_PYTHON names a Python that has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from mtl_export.checkpoint.tensors import Array
from mtl_export_cli.main import cli

pytestmark = [pytest.mark.other_env, pytest.mark.timeout(1800)]

REQUIREMENTS = (
    "onnx==1.23.2", "onnxruntime>=1.31", "onnxslim==0.1.98", "onnxsim==0.8.1",
    "openvino==2026.4.1", "polygraphy==0.53.6", "onnx-graphsurgeon>=0.6.1",
)  # fmt: skip
EXAMPLE = Path(__file__).parents[2] / "examples" / "01_ads_relevance"
TASKS = 5
# Two of these OpenVINO cuts to ids of tasks: it reads int64 inputs as int32.
UNKNOWN = (5, 9, -1, 2**31, 2**32, 2**32 + 2, -(2**32), -(2**63))
# Which tools know no functions of a model.
INLINED = ("openvino", "opset21", "opset23")
# Measured: 2.5e-6, OpenVINO, on logits of 10.
NOISE = 2e-5


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Python that has the tools."""
    given = os.environ.get("GRAPH_TOOLS_PYTHON")
    if given is not None:
        return given
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    made = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    subprocess.run([made, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return made


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return the example's graph, by whether its functions are expanded."""
    found = {}
    for inline in (False, True):
        folder = tmp_path_factory.mktemp("graph") / "onnx"
        words = ["onnx", "--all-tasks", "-o", str(folder), *(["--inline"] if inline else [])]
        words += ["--config", str(EXAMPLE / "mtl-export.toml")]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        found[inline] = folder / "model.onnx"
    return found


def rows() -> dict[str, Array]:
    """Return padded rows of every task and of every unknown id."""
    task_ids = np.array([*range(TASKS), *UNKNOWN])
    ids = np.random.default_rng(0).integers(1000, 20000, (len(task_ids), 23))
    mask = (np.arange(23) < 5 + np.arange(len(task_ids))[:, None]).astype(np.int64)
    zeros = np.zeros_like(ids)
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": zeros, "task_ids": task_ids,
    }  # fmt: skip


@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim", "polygraphy", *INLINED])
def test_what_a_tool_makes_of_the_graph_answers_alike(
    python: str, graphs: dict[bool, Path], tool: str, tmp_path: Path
) -> None:
    """Every task's numbers, and NaN in the rows of unknown ids and in no other."""
    graph, feed = graphs[tool in INLINED], rows()
    np.savez(tmp_path / "inputs.npz", **feed)  # type: ignore[arg-type]
    script = Path(__file__).with_name("graph_tools.py")
    files = [str(tmp_path / name) for name in ("made.onnx", "inputs.npz", "answers.npz")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, str(script), tool, str(graph), *files], check=True, env=environment)
    with np.load(files[2]) as stored:
        found = stored["logits"]
    expected = onnxruntime.InferenceSession(str(graph)).run(None, feed)[0]
    assert np.isnan(expected).any(axis=1).tolist() == [False] * TASKS + [True] * len(UNKNOWN)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE)
