"""What the parts of an encoder-decoder must have, on graphs of a few nodes."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.errors import GraphError
from mtl_export.graph.passes.markers import layer_of, markers
from mtl_export.graph.seq2seq import STEMS, checked_parts
from tests.graph import marked

ENCODER = """
x = mtl_export.TaskLinear <module = "enc"> (a, w)
"""
DECODER = """
k = mtl_export.TaskLinear <module = "cross.k"> (a, w)
q = mtl_export.TaskLinear <module = "cross.q"> (b, w)
x = Add (q, k)
"""
WITH_PAST = """
q = mtl_export.TaskLinear <module = "cross.q"> (b, w)
x = Add (q, a)
"""
LAYERS = ("enc", "cross.k", "cross.q")


def graph(body: str, *outputs: str) -> ir.Model:
    """Return a graph of these nodes."""
    named = ", ".join(f"float[3] {name}" for name in ("x", *outputs))
    text = f"""
    <ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
    part (float[3] a, float[3] b, float[3, 3] w) => ({named}) {{{body}}}
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value in model.graph.outputs[1:]:
        value.name = f"present.0.encoder.{value.name}"
    return model


def bound(layers: tuple[str, ...]) -> BoundModel:
    """Return an adapter of these layers."""
    toy = marked.bound()
    some = next(iter(toy.adapters.layers.values()))
    adapters: Any = toy.adapters
    object.__setattr__(adapters, "layers", MappingProxyType(dict.fromkeys(layers, some)))
    object.__setattr__(adapters, "heads", MappingProxyType({}))
    return toy


def checked(encoder: str, decoder: str, with_past: str, layers: tuple[str, ...] = LAYERS) -> Any:
    """Return the parts of these graphs."""
    graphs = (graph(encoder), graph(decoder, "k"), graph(with_past))
    return checked_parts(dict(zip(STEMS, graphs, strict=True)), bound(layers))


def test_what_the_cache_holds_need_not_be_computed_again() -> None:
    """The layer that makes the encoder's keys is in one part, all others where they work."""
    parts = checked(ENCODER, DECODER, WITH_PAST)
    assert [part.modules for part in parts] == [("enc",), ("cross.k", "cross.q"), ("cross.q",)]
    assert [part.stem for part in parts] == list(STEMS)


def test_a_layer_may_be_used_several_times() -> None:
    """It is one layer of the part; its markers say which use each is."""
    twice = 'k = mtl_export.TaskLinear <module = "enc"> (a, w)' + ENCODER.replace("(a", "(k")
    encoder = checked(twice, DECODER, WITH_PAST)[0]
    assert encoder.modules == ("enc",)
    assert [layer_of(node) for node in markers(encoder.model)] == ["enc", "enc@2"]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (("x = Relu (a)", DECODER, WITH_PAST), "enc"),
        ((ENCODER, DECODER, "x = Add (b, a)"), "cross.q"),
    ],
    ids=["lost by all", "lost by the step alone"],
)
def test_a_lost_layer_is_refused(parts: tuple[str, str, str], found: str) -> None:
    """It would be exported without its adapter; the layer is named."""
    with pytest.raises(GraphError, match=found) as caught:
        checked(*parts)
    assert "in each graph that computes it" in str(caught.value)
