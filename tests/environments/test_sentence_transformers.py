"""What sentence-transformers itself makes of exports, in an environment of its own.

Opt-in: ``pytest -m adapters_env tests/environments/test_sentence_transformers.py``. It makes a
virtual environment and installs sentence-transformers there, unless
SENTENCE_TRANSFORMERS_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export_cli.main import cli
from tests.adapters import toys
from tests.factories import HIDDEN, toy_base

pytestmark = [pytest.mark.adapters_env, pytest.mark.timeout(1800)]

REQUIREMENTS = ("sentence-transformers==5.7.0", "optimum==2.1.0", "optimum-onnx==0.1.0",
                "transformers==4.57.6", "torch==2.13.0", "onnxruntime")  # fmt: skip
QUERY = "encoder.layer.0.attention.self.query"
# Longer than the pipeline's 9 tokens, and shorter.
TEXTS = ["cheap pills", "is this a question or an answer to one that was never asked " * 3, "ham"]
SCRIPT = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
for folder, backend in json.loads(sys.argv[1]):
    model = SentenceTransformer(folder, backend=backend)
    np.save(folder + "/vectors.npy", model.encode(json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a Python with sentence-transformers."""
    found = os.environ.get("SENTENCE_TRANSFORMERS_PYTHON")
    if found is None:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=True)
        found = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        subprocess.run([found, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return found


def write_base(base: Path, mode: str, *, dense: bool) -> None:
    """Write a toy base with a pipeline: pooling, Dense if asked for, Normalize."""
    toy_base(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    # transformers 4, which optimum-onnx needs, does not know the class that 5 writes.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense",
             "Normalize": "3_Normalize"}  # fmt: skip
    kinds = {kind: path for kind, path in kinds.items() if dense or kind != "Dense"}
    (base / "modules.json").write_text(json.dumps([
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(kinds.items())
    ]))  # fmt: skip
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text(json.dumps({
        "word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_cls_token": mode == "cls", "pooling_mode_max_tokens": mode == "max",
    }))  # fmt: skip
    if dense:
        (base / "2_Dense").mkdir()
        (base / "2_Dense/config.json").write_text(json.dumps({
            "in_features": HIDDEN, "out_features": 5, "bias": False,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }))  # fmt: skip
        weight = np.random.default_rng(0).normal(size=(5, HIDDEN)).astype(np.float32)
        save_file({"linear.weight": weight}, base / "2_Dense/model.safetensors")


@pytest.mark.parametrize(
    ("mode", "dense", "pooled"),
    [("cls", False, ("cls", "--normalize")), ("mean", False, ("mean",)), ("max", True, ())],
)
def test_vectors_are_the_pipelines(
    python: str, tmp_path: Path, mode: str, *, dense: bool, pooled: tuple[str, ...]
) -> None:
    """Merged folder and per-task graphs give the vectors of the base with the task's weights."""
    base, truth = tmp_path / "base", tmp_path / "truth"
    write_base(base, mode, dense=dense)
    write_folder(
        tmp_path / "adapter", tasks=(Task("search", 0), Task("cluster", 1)),
        layers={QUERY: toys.layer_values(3, inputs=HIDDEN, outputs=HIDDEN, tasks=2, dtype="F32")},
        heads={}, alpha=7.0, temperature=0.3, model_class="BertModel",
        base=BaseReference("base", ""),
    )  # fmt: skip
    sources = ["-c", str(tmp_path / "adapter"), "-b", str(base), "--task", "search", "-o"]
    exports: list[tuple[str, str, tuple[str, ...]]] = [
        ("merge", "merged", ()),
        ("onnx", "graph", ()),
    ]
    exports += [("onnx", "pooled", ("--pooling", *pooled))] if pooled else []
    for command, name, more in exports:
        result = CliRunner().invoke(cli, [command, *sources, str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
    shutil.copytree(base, truth)
    shutil.copy(tmp_path / "merged/search/model.safetensors", truth)
    folders = [str(tmp_path / name / "search") for _, name, _ in exports]
    backends = [(str(truth), "torch"), (folders[0], "torch"), *((f, "onnx") for f in folders[1:])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, "-c", SCRIPT, json.dumps(backends), json.dumps(TEXTS)],
                   check=True, cwd=tmp_path, env=environment)  # fmt: skip
    right, *found = (np.load(Path(folder) / "vectors.npy") for folder, _ in backends)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, atol=1e-6)
    for (folder, _), vectors in zip(backends[1:], found, strict=True):
        np.testing.assert_allclose(vectors, right, rtol=0, atol=2e-6, err_msg=folder)
