from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.errors import GraphError
from mtl_export.graph.passes.pool_states import PoolStatesPass
from mtl_export.parity.outputs import embedded
from tests.graph.marked import evaluate

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
toy (float[batch, sequence, 5] x, int64[batch, sequence] attention_mask)
  => (float[batch, sequence, 5] last_hidden_state, float[batch, 5] pooler_output)
{
    last_hidden_state = Tanh (x)
    zero = Constant <value_int = 0> ()
    pooler_output = Gather <axis = 1> (x, zero)
}
"""
X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])


def pooled(embedding: SentenceEmbedding, text: str = GRAPH) -> ir.Model:
    """Return the graph with its hidden states pooled."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    return PoolStatesPass(embedding)(model).model


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_vector_is_the_documented_one(pooling: str, normalize: bool) -> None:
    """One vector a row, padding not counted, of length 1 where that is asked for."""
    embedding = SentenceEmbedding(pooling, normalize)  # type: ignore[arg-type]
    model = pooled(embedding)
    assert [value.name for value in model.graph.outputs] == ["sentence_embedding"]
    assert model.graph.outputs[0].shape == ir.Shape(["batch", 5])
    found = evaluate(model, x=X, attention_mask=MASK)
    h = np.tanh(X.astype(float))
    expected = np.stack(
        [
            h[row][MASK[row] == 1].mean(axis=0) if pooling == "mean" else h[row][0]
            for row in range(3)
        ]
    )
    if normalize:
        expected /= np.sqrt((expected**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(embedded(h, MASK, embedding), expected, atol=1e-12)


def test_images_have_no_mask() -> None:
    """Without an attention mask every position counts."""
    text = GRAPH.replace(", int64[batch, sequence] attention_mask", "")
    found = evaluate(pooled(SentenceEmbedding("mean"), text), x=X)
    np.testing.assert_allclose(found, np.tanh(X).mean(axis=1), atol=1e-6)


def test_a_row_without_a_token_is_zero() -> None:
    """NaN is kept for rows without a task."""
    mask = MASK * np.array([[1], [0], [1]])
    found = evaluate(pooled(SentenceEmbedding("mean", normalize=True)), x=X, attention_mask=mask)
    np.testing.assert_array_equal(found[1], 0)
    assert not np.isnan(found).any()


@pytest.mark.parametrize(
    "old", ["last_hidden_state", "float[batch, sequence, 5] last_hidden_state"]
)
def test_a_model_without_hidden_states_is_refused(old: str) -> None:
    """A head's logits are no token states, nor are states of another shape."""
    new = "logits" if old == "last_hidden_state" else "float[batch, 2, 2, 5] last_hidden_state"
    with pytest.raises(GraphError, match="--pooling") as caught:
        pooled(SentenceEmbedding("mean"), GRAPH.replace(old, new))
    assert "bare encoder" in caught.value.expected


def test_the_choice_survives_the_metadata() -> None:
    """What is written is what is read."""
    for embedding in (SentenceEmbedding("mean", True), SentenceEmbedding("cls")):
        assert SentenceEmbedding.from_json(embedding.to_json()) == embedding
    assert SentenceEmbedding.from_json("") is None
