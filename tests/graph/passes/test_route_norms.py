"""LayerNorms and layers inside the model that differ between tasks: graphs written as text."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet, LayerAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.passes.merge_task import MergeTaskPass
from mtl_export.graph.passes.route_norms import RouteNormsPass
from mtl_export.graph.passes.route_tasks import RouteTasksPass
from tests.adapters.toys import memory_tensor
from tests.graph import marked

TASKS = tuple(Task(name, index) for index, name in enumerate("abc"))
FEATURES, EPSILON = 5, 0.125  # large, so that a lost epsilon shows
NORM = f"""
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[batch, sequence, 5] x) => (float[batch, sequence, 5] y)
{{
    y = mtl_export.TaskNorm <module = "norm", epsilon = {EPSILON}> (x, w, b)
}}
"""
LINEAR = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[batch, sequence, 5] x) => (float[batch, sequence, 5] y)
{
    y = mtl_export.TaskLinear <module = "layer"> (x, layer_w, layer_b)
}
"""
WHOLE = LINEAR.replace("TaskLinear", "TaskHead").replace("(x, layer_w, layer_b)", "(x)")
GENERATOR = np.random.default_rng(0)
BASE = {
    name: GENERATOR.normal(size=shape).astype(np.float32)
    for name, shape in {
        "norm.weight": (FEATURES,), "norm.bias": (FEATURES,),
        "layer.weight": (FEATURES, FEATURES), "layer.bias": (FEATURES,),
    }.items()
}  # fmt: skip
X = GENERATOR.normal(size=(4, 3, FEATURES)).astype(np.float32)
IDS = np.array([2, 0, 1, 0])
OWN = {name: GENERATOR.normal(size=value.shape) for name, value in BASE.items()}


def bound(*own: str, layers: Any = MappingProxyType({}), model_type: str = "bert") -> BoundModel:
    """Return three tasks; the first and last keep the base's, the second has its own."""
    adapters = AdapterSet(
        family="lora", tasks=TASKS, layers=layers, heads={}, model_class="Toy",
        checkpoint_sha256="", task_replaced={name: (None, OWN[name], None) for name in own},
    )  # fmt: skip
    checkpoint = Checkpoint(
        path=Path("memory"), format="memory", family="lora", tasks=TASKS, layers={}, heads={},
        base=BaseReference(), model_class="Toy", sha256="",
    )  # fmt: skip
    tensors = {name: memory_tensor(name, value) for name, value in BASE.items()}
    config = MappingProxyType({"model_type": model_type})
    base = BaseModel("memory", Path("memory"), config, tensors, ())
    return BoundModel(checkpoint, adapters, base, "")


def model(text: str) -> ir.Model:
    """Return the graph with the base's tensors as initializers."""
    proto = onnx.parser.parse_model(text)
    names = {"w": "norm.weight", "b": "norm.bias", "layer_w": "layer.weight",
             "layer_b": "layer.bias"}  # fmt: skip
    for key, name in names.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(BASE[name], key))
    return ir.from_proto(proto)


def tensor(name: str, task: int, own: tuple[str, ...]) -> Array:
    """Return what a task has as ``name``."""
    return OWN[name] if task == 1 and name in own else BASE[name].astype(np.float64)


def normalised(task: int, own: tuple[str, ...]) -> Array:
    """Return the task's LayerNorm of all rows."""
    x = X.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    result: Array = scaled * tensor("norm.weight", task, own) + tensor("norm.bias", task, own)
    return result


def linear(task: int, own: tuple[str, ...]) -> Array:
    """Return the task's linear layer of all rows."""
    result: Array = X @ tensor("layer.weight", task, own).T + tensor("layer.bias", task, own)
    return result


@pytest.mark.parametrize(
    "own", [("norm.bias",), ("norm.weight",), ("norm.weight", "norm.bias")], ids=str
)
def test_norms(own: tuple[str, ...]) -> None:
    """Every row has its own task's scale and bias; a bad id is NaN; merged is one stock op."""
    case = bound(*own)
    routed = RouteNormsPass(case)(model(NORM)).model
    found = marked.evaluate(routed, x=X, task_ids=IDS)
    for row, task in enumerate(IDS):
        np.testing.assert_allclose(found[row], normalised(task, own)[row], rtol=1e-4, atol=1e-5)
    spoilt = marked.evaluate(routed, x=X, task_ids=np.array([3, 0, -1, 0]))
    assert np.isnan(spoilt[[0, 2]]).all()
    np.testing.assert_array_equal(spoilt[[1, 3]], found[[1, 3]])
    expected = {
        ("", "LayerNormalization"): 1, ("mtl_export", "TaskVectors"): 1 + ("norm.weight" in own),
    }  # fmt: skip
    assert expected.items() <= marked.counts(routed).items()
    for task in TASKS:
        merged = MergeTaskPass(case, task)(model(NORM)).model
        assert marked.counts(merged) == {("", "LayerNormalization"): 1}
        alone = marked.evaluate(merged, x=X)
        np.testing.assert_allclose(alone, normalised(task.index, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "own"),
    [(LINEAR, ("layer.bias",)), (WHOLE, ("layer.weight",)),
     (WHOLE, ("layer.weight", "layer.bias"))],
    ids=["bias", "weight", "both"],
)  # fmt: skip
def test_layers_that_no_adapter_touches(text: str, own: tuple[str, ...]) -> None:
    """A bias is gathered behind the shared product; a whole layer is gathered itself."""
    case = bound(*own)
    routed = RouteTasksPass(case)(model(text)).model
    found = marked.evaluate(routed, x=X, task_ids=IDS)
    for row, task in enumerate(IDS):
        np.testing.assert_allclose(found[row], linear(task, own)[row], rtol=1e-4, atol=1e-5)
    for task in TASKS:
        merged = MergeTaskPass(case, task)(model(text)).model
        assert marked.counts(merged) == {("", "MatMul"): 1, ("", "Add"): 1}
        alone = marked.evaluate(merged, x=X)
        np.testing.assert_allclose(alone, linear(task.index, own), rtol=1e-4, atol=1e-5)


def test_a_whole_conv1d_is_turned() -> None:
    """GPT-2 stores [I, O], the base's and the trained one alike."""
    text = WHOLE.replace('"layer"', '"c_proj"')
    case = bound(model_type="gpt2")
    own = {"c_proj.weight": (None, OWN["layer.weight"], None)}
    adapters = AdapterSet(
        family="lora", tasks=TASKS, layers={}, heads={}, model_class="Toy", checkpoint_sha256="",
        task_replaced=own,
    )  # fmt: skip
    tensors = {f"c_proj.{k}": case.base.tensors[f"layer.{k}"] for k in ("weight", "bias")}
    base = BaseModel("memory", Path("memory"), case.base.config, tensors, ())
    turned = BoundModel(case.checkpoint, adapters, base, "")
    found = marked.evaluate(RouteTasksPass(turned)(model(text)).model, x=X, task_ids=IDS)
    for row, task in enumerate(IDS):
        weight = tensor("layer.weight", task, ("layer.weight",))
        expected = X[row] @ weight + BASE["layer.bias"]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_adapted_here_and_replaced_there_is_refused() -> None:
    """The base weight is shared by all rows; per task is the way out."""
    layer = LayerAdapter(
        "layer", down=np.ones((1, FEATURES)), core=np.ones((3, 1, 1)), up=np.ones((FEATURES, 1))
    )
    with pytest.raises(GraphError, match="another replaced it whole") as caught:
        RouteTasksPass(bound("layer.weight", layers={"layer": layer}))(model(LINEAR))
    assert caught.value.problem.startswith("layer")
    assert "--layout per-task" in caught.value.fix


def test_norms_of_other_rows_are_refused() -> None:
    """An input whose rows are not the batch's."""
    text = NORM.replace("float[batch, sequence, 5] x", "float[windows, sequence, 5] x")
    with pytest.raises(GraphError, match="its input has shape"):
        RouteNormsPass(bound("norm.bias"))(model(text))
