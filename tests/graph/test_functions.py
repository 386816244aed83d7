from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.functions import FUNCTIONS
from tests.graph import marked

B, S, I, O, D, U, R, L, T = 4, 3, 5, 7, 2, 6, 2, 4, 3  # noqa: E741 - the names of functions
V, N = 6, 9  # an embedding's entries, and those of all tasks together
IDS = np.array([2, 0, 1, 3])
SHAPES: dict[str, tuple[int, ...]] = {
    "down": (I, D), "core": (T + 1, D, U), "up": (U, O), "downs": (T + 1, I, R),
    "ups": (T + 1, R, O), "weights": (T + 1, I, L), "biases": (T + 1, L), "rows": (T + 1, O),
    "table": (N, O), "z": (B, S, D), "cores": (B, D, U), "ones": (B, S, 1),
}  # fmt: skip


def operands(name: str) -> dict[str, Array]:
    """Return seeded values for the function's inputs, by name."""
    generator = np.random.default_rng(0)
    found: dict[str, Array] = {}
    whole_numbers = {
        "task_ids": IDS,
        "task_id": np.array(1),
        "starts": np.arange(T + 1) * V,
        "slots": generator.integers(0, N, (T + 1) * V),
    }
    is_embedding = name.startswith("TaskEmbedding")
    for value in FUNCTIONS[name](20).inputs:
        assert value.name is not None
        if value.name in whole_numbers:
            found[value.name] = whole_numbers[value.name]
        elif value.name == "x" and is_embedding:
            found[value.name] = generator.integers(0, V, (B, S))
        elif value.name == "downs" and is_embedding:
            found[value.name] = generator.normal(size=((T + 1) * V, R)).astype(np.float32)
        else:
            x_shape = (B, I) if name.endswith("Rows") else (B, S, I)
            shape = x_shape if value.name == "x" else SHAPES[value.name]
            found[value.name] = generator.normal(size=shape).astype(np.float32)
    return found


def called(name: str, inputs: dict[str, Array], shape: tuple[int, ...]) -> Array:
    """Return what a model that calls the function computes, its output declared ``shape``."""
    function = FUNCTIONS[name](20)
    arguments = [
        ir.Value(
            name=key, shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for key, array in inputs.items()
    ]  # fmt: skip
    node = ir.Node("mtl_export", name, arguments)
    node.outputs[0].name = "result"
    node.outputs[0].shape = ir.Shape(shape)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        arguments, node.outputs, nodes=[node], opset_imports={"": 20, "mtl_export": 1}, name="g"
    )
    model = ir.Model(graph, ir_version=10, functions=[function])
    return marked.evaluate(model, **inputs)


def expected_row(name: str, v: dict[str, Array], row: int, task: int) -> Array:
    """Return the documented formula for one row."""
    if name.startswith("TaskVector"):
        return np.asarray(v["rows"][task] if name.endswith("Rows") else v["rows"][task][None])
    if name.startswith(("TaskHead", "OneTaskHead")):
        return np.asarray(v["x"][row] @ v["weights"][task] + v["biases"][task])
    if name == "TaskEmbeddingDelta":
        return np.asarray(v["downs"][task * V + v["x"][row]] @ v["ups"][task])
    if name == "TaskEmbeddingRows":
        return np.asarray(v["table"][v["slots"][task * V + v["x"][row]]])
    if name.startswith("TaskOwnDelta"):
        return np.asarray(v["x"][row] @ v["downs"][task] @ v["ups"][task])
    if name in {"TaskUp", "TaskComposedUp"}:
        return np.asarray(v["z"][row] @ v["cores"][row] @ v["up"])
    if name.startswith("TaskJoin"):
        mixed = v["z"][row] @ v["cores"][row]
        return np.concatenate([v["x"][row], mixed, *([v["ones"][row]] if "ones" in v else [])], -1)
    return np.asarray(v["x"][row] @ v["down"] @ v["core"][task] @ v["up"])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_body_computes_what_the_docstring_says(name: str) -> None:
    """Every function equals its formula row by row, each row with its own id if it has one."""
    values = operands(name)
    ids = np.broadcast_to(values.get("task_id", IDS), B)
    expected = np.stack([expected_row(name, values, row, task) for row, task in enumerate(ids)])
    found = called(name, values, expected.shape)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bodies_are_stock_and_closed(name: str) -> None:
    """A body uses standard ops only, its own inputs only, and no two names alike."""
    function = FUNCTIONS[name](20)
    assert (function.domain, function.name) == ("mtl_export", name)
    known = {value.name for value in function.inputs}
    for node in function:
        assert node.domain == ""
        assert {value.name for value in node.inputs if value is not None} <= known
        outputs = {value.name for value in node.outputs}
        assert not outputs & known
        known |= outputs
    assert [value.name for value in function.outputs] == ["y"]
    assert function.opset_imports == {"": 20}
