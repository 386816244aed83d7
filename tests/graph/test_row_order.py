from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mtl_export.graph.row_order import note_row_orders, probed_orders

B, S, H = 3, 6, 4
INPUTS = {
    "input_ids": torch.arange(B * S).reshape(B, S) % 17,
    "attention_mask": torch.ones(B, S, dtype=torch.int64),
}
Arrange = Callable[[torch.Tensor], torch.Tensor]


class Arranged(nn.Module):
    """An embedding and a linear layer that sees its vectors in another order."""

    def __init__(self, arrange: Arrange, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(17, H), nn.Linear(H, H)
        self._arrange, self._calls = arrange, calls

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the linear layer's last result."""
        x = self._arrange(self.embedding(input_ids))
        results: list[torch.Tensor] = [self.linear(x) for _ in range(self._calls)]
        return results[-1]


class Twice(Arranged):
    """A layer that is given texts sequence first, then row by row."""

    def __init__(self) -> None:
        super().__init__(lambda x: x.transpose(0, 1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the second result."""
        first: torch.Tensor = super().forward(input_ids, attention_mask)
        second: torch.Tensor = self.linear(first.transpose(0, 1))
        return second


def windows(x: torch.Tensor) -> torch.Tensor:
    """Return pairs of tokens, shifted by one as Swin shifts its windows."""
    return x.roll(1, dims=1).reshape(-1, 2, H)


@pytest.mark.parametrize(
    ("arrange", "order"),
    [
        pytest.param(lambda x: x, "batch", id="as they are"),
        pytest.param(lambda x: x.reshape(len(x), 2, 3, H), "batch", id="height and width"),
        pytest.param(lambda x: x[:, 0], "batch", id="first token"),
        pytest.param(lambda x: x.reshape(-1, H), "repeated", id="packed"),
        pytest.param(windows, "repeated", id="shifted windows"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=0), "repeated", id="beams"),
        pytest.param(lambda x: x.repeat(2, 1, 1), "tiled", id="tiled"),
        pytest.param(lambda x: x.transpose(0, 1).reshape(-1, H), "tiled", id="packed by position"),
        pytest.param(lambda x: x.transpose(0, 1), "second", id="sequence first"),
        pytest.param(lambda x: x.flip(0), None, id="backwards"),
        pytest.param(lambda x: x.flip(0).reshape(-1, H), None, id="packed backwards"),
        pytest.param(lambda x: x.permute(1, 2, 0).reshape(-1, H), None, id="scattered"),
        pytest.param(lambda x: x + x.mean(dim=0), None, id="mixed with its neighbours"),
        pytest.param(lambda x: x.mean(dim=0), None, id="one for all rows"),
        pytest.param(lambda x: x * 0, None, id="the same whatever the rows"),
        pytest.param(lambda x: x / 0, None, id="not finite"),
        pytest.param(lambda x: x[x[..., 0] > 0], None, id="as many as the values say"),
    ],
)
def test_the_order_is_found_by_trying(arrange: Arrange, order: str | None) -> None:
    """What changes with a row of the batch is that row's; what does not fit is not guessed."""
    model = Arranged(arrange)
    assert probed_orders(model, {"linear": model.linear}, INPUTS) == {"linear": order}


def test_a_layer_that_is_called_twice_has_no_order() -> None:
    """Its two inputs may come in two orders."""
    model = Arranged(lambda x: x, calls=2)
    assert probed_orders(model, {"linear": model.linear}, INPUTS) == {"linear": None}


def test_each_use_of_a_layer_has_its_order() -> None:
    """As many as the graph has; where PyTorch calls it more often, none is guessed."""
    model = Twice()
    layer, other = {"linear": model.linear}, {"linear": None, "linear@2": None, "linear@3": None}
    found = probed_orders(model, layer, INPUTS, {"linear": 2})
    assert found == {"linear": "second", "linear@2": "batch"}
    assert probed_orders(model, layer, INPUTS, {"linear": 3}) == other


def test_the_hooks_are_gone_afterwards() -> None:
    """The model is left as it was."""
    model = Arranged(lambda x: x)
    probed_orders(model, {"linear": model.linear}, INPUTS)
    assert not model.linear._forward_pre_hooks


@pytest.mark.parametrize(
    ("shape", "arrange", "noted"),
    [
        ("batch, sequence, 4", lambda x: x.flip(0), False),
        ("6*batch, 4", lambda x: x.reshape(-1, H), True),
        ("batch*sequence, 4", lambda x: x.reshape(-1, H), True),
        ("sequence, batch, 4", lambda x: x.transpose(0, 1), True),
        ("6*batch, 4", lambda x: x.permute(1, 2, 0).reshape(-1, H), False),
        ("18, 4", lambda x: x.reshape(-1, H), False),
        ("rows, 4", lambda x: x.reshape(-1, H), False),
        ("sequence, 3, 4", lambda x: x.transpose(0, 1), False),
    ],
)
def test_markers_say_what_was_found(shape: str, arrange: Arrange, noted: bool) -> None:
    """Only where rows are not plainly the batch's, and their number was traced to follow it."""
    dims = [int(dim) if dim.strip().isdigit() else dim.strip() for dim in shape.split(",")]
    text = """<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
    g (float[batch] x, float[4, 4] w) => (float[batch] y)
    { y = mtl_export.TaskLinear <module = "linear"> (x, w) }"""
    graph = ir.from_proto(onnx.parser.parse_model(text))
    graph.graph.inputs[0].shape = ir.Shape(dims)
    model = Arranged(arrange)
    note_row_orders(graph, model, {"linear": model.linear}, INPUTS)
    assert ("rows" in graph.graph[0].attributes) == noted
