from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mtl_export.errors import EngineRunError
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case
from mtl_export.parity.checks.metadata import INTERFACE, beside_cells
from mtl_export.parity.judged import Judged
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Verdict
from mtl_export.parity.tolerance import Tolerance
from tests.adapters import toys
from tests.parity.fakes import FakeRunner, right

CACHE = ("present.0.key", "present.0.value")


def write_part(path: Path, inputs: tuple[str, ...], outputs: dict[str, int]) -> None:
    """Write a graph that gives ``outputs``, by name their element types."""
    nodes = [
        helper.make_node("Cast", [inputs[0]], [name], to=number) for name, number in outputs.items()
    ]
    graph = helper.make_graph(
        nodes, "part",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in inputs],
        [helper.make_tensor_value_info(n, t, ["batch"]) for n, t in outputs.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the toy model's base and adapter."""
    path = tmp_path_factory.mktemp("beside")
    toys.toy_bound(path)
    return path


def interface(folder: Path, path: Path, dtype: str = "fp32") -> tuple[Verdict, str]:
    """Return verdict and reason of the cell on inputs and outputs."""
    bound = toys.bound_model(folder / "base", folder / "adapter")
    artefact = Artefact(
        "single-graph onnx", "single-graph", FakeRunner(right), None, dtype, "", "", path=path
    )
    exact = [Reference(Case("all", {}), Subject("logits"), np.empty(0), "all")]
    cells = beside_cells(Judged(bound, artefact, exact, {}, Tolerance()))
    (cell,) = (cell for cell in cells if cell.case == INTERFACE)
    return cell.verdict, cell.reason


@pytest.mark.parametrize(
    ("outputs", "dtype", "reason"),
    [
        ({"logits": TensorProto.FLOAT}, "fp32", ""),
        ({"logits": TensorProto.FLOAT16}, "fp16", ""),
        ({"logits": TensorProto.FLOAT}, "fp16", ""),
        ({"logits": TensorProto.FLOAT16}, "fp32", "'logits' of model.onnx is float16, not float32"),
        ({"logits": TensorProto.DOUBLE}, "fp32", "'logits' of model.onnx is float64, not float32"),
        ({"logits": TensorProto.INT64}, "fp32", "'logits' of model.onnx is int64, not float32"),
        (
            {"logits": TensorProto.FLOAT, "hidden": TensorProto.FLOAT}, "fp32",
            "model.onnx has the output 'hidden', which nobody asked for",
        ),
        (
            {"logits": TensorProto.FLOAT, CACHE[0]: TensorProto.FLOAT}, "fp32",
            f"model.onnx has the output '{CACHE[0]}', which nobody asked for",
        ),
    ],
)  # fmt: skip
def test_a_graph_gives_what_is_asked_in_its_dtype(
    folder: Path, tmp_path: Path, outputs: dict[str, int], dtype: str, reason: str
) -> None:
    """No output more, and no wider or narrower type than the file says."""
    write_part(tmp_path / "model.onnx", ("x",), outputs)
    expected = ("failed" if reason else "passed", reason)
    assert interface(folder, tmp_path / "model.onnx", dtype) == expected


@pytest.mark.parametrize("handed_on", [CACHE, CACHE[:1]])
def test_a_step_reads_the_caches_that_the_prompt_gave(
    folder: Path, tmp_path: Path, handed_on: tuple[str, ...]
) -> None:
    """A cache that is read and never written is named."""
    past = tuple(name.replace("present", "past_key_values") for name in CACHE)
    given = dict.fromkeys(("logits", *handed_on), int(TensorProto.FLOAT))
    write_part(tmp_path / "prefill.onnx", ("x",), given)
    given = dict.fromkeys(("logits", *CACHE), int(TensorProto.FLOAT))
    write_part(tmp_path / "decode.onnx", ("x", *past), given)
    found = interface(folder, tmp_path / "prefill.onnx")
    lost = "prefill.onnx has no output 'present.0.value', which the next step reads"
    assert found == (("passed", "") if handed_on == CACHE else ("failed", lost))


def test_a_file_that_is_no_graph_is_named(folder: Path, tmp_path: Path) -> None:
    """It fails by its name, not by protobuf's words."""
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 9)
    with pytest.raises(EngineRunError, match="not an ONNX file") as caught:
        interface(folder, tmp_path / "model.onnx")
    assert str(tmp_path / "model.onnx") in str(caught.value)
