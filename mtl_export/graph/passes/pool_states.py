"""Turn the hidden states of a text's tokens into one vector, inside the graph.

    mean      MatMul(mask, h) / sum(mask)      mask [B, 1, S], h [B, S, H]
    cls       h[:, 0]
    then v / |v| where it is asked for

The words are those of ``mtl_export.checkpoint.sentence_embedding``.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.checkpoint.sentence_embedding import HIDDEN_STATES, OUTPUT, SentenceEmbedding
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.passes.routing import name_values
from mtl_export.names import ATTENTION_MASK

# A text without a token, or of length 0, is 0 and not NaN: NaN means that a task is unknown.
# The values are those of sentence-transformers and of torch.nn.functional.normalize.
SMALLEST_COUNT, SMALLEST_LENGTH = 1e-9, 1e-12


class PoolStatesPass(ir.passes.InPlacePass):
    """Replace the outputs of a bare encoder by ``sentence_embedding`` ``[batch, H]``.

    Cases
        1. ``mean`` with an ``attention_mask``: over the tokens that are not padding.
        2. ``mean`` without one (images): over all.
        3. ``cls``: the first token.
        4. no output ``last_hidden_state`` [batch, S, H], or one of some tasks only: refused.

    Args:
        embedding: What is asked for.
        keep_states: Keep ``last_hidden_state`` beside it: sentence-transformers opens no graph
            without, because optimum, which runs it there, asks for that output.
    """

    def __init__(self, embedding: SentenceEmbedding, *, keep_states: bool = False) -> None:
        super().__init__()
        self._keep_states = keep_states
        self._embedding = embedding

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pool the hidden states of ``model``."""
        graph = model.graph
        hidden = next((value for value in graph.outputs if value.name == HIDDEN_STATES), None)
        is_shared = hidden is not None and not _is_of_some_tasks(hidden)
        if hidden is None or hidden.shape is None or len(hidden.shape) != 3 or not is_shared:
            found = "none of this shape" if hidden is None else str(hidden.shape)
            raise GraphError(
                f"--pooling: outputs {shortened(str(value.name) for value in graph.outputs)}; "
                f"{found}",
                expected=(
                    f"a bare encoder with the output {HIDDEN_STATES} [batch, sequence, H], because "
                    "a sentence embedding is pooled from the tokens' hidden states"
                ),
                fix="Leave out --pooling: this model answers with its head",
            )
        ops = tape.Tape(graph)
        mask = next((value for value in graph.inputs if value.name == ATTENTION_MASK), None)
        if self._embedding.pooling == "cls":
            first = ops.op("Constant", [], {"value_int": 0}, name=f"{OUTPUT}/first")
            vector = ops.op("Gather", [hidden, first], {"axis": 1}, name=f"{OUTPUT}/cls")
        else:
            vector = _mean(hidden, mask, ops)
        if self._embedding.normalize:
            vector = _normalized(vector, ops)
        name_values(ops, vector)
        vector.name = OUTPUT
        vector.shape = ir.Shape([hidden.shape[0], hidden.shape[2]])
        vector.type = hidden.type
        graph.outputs.clear()
        graph.outputs.extend([vector, hidden] if self._keep_states else [vector])
        return ir.passes.PassResult(model, modified=True)


def _is_of_some_tasks(hidden: ir.Value) -> bool:
    """Return whether other tasks answer with another output: their rows are no states."""
    node = hidden.producer()
    return node is not None and node.name == names.value(f"head.{HIDDEN_STATES}", names.ANSWERS)


def _mean(hidden: ir.Value, mask: ir.Value | None, ops: tape.Tape) -> ir.Value:
    axis = ops.op("Constant", [], {"value_ints": [1]}, name=f"{OUTPUT}/axis")
    if mask is None:
        return ops.op("ReduceMean", [hidden, axis], {"keepdims": 0}, name=f"{OUTPUT}/mean")
    weights = ops.op("CastLike", [mask, hidden], name=f"{OUTPUT}/weights")
    row = ops.op("Unsqueeze", [weights, axis], name=f"{OUTPUT}/row")
    total = ops.op("MatMul", [row, hidden], name=f"{OUTPUT}/sum")
    vector = ops.op("Squeeze", [total, axis], name=f"{OUTPUT}/sums")
    count = ops.op("ReduceSum", [weights, axis], {"keepdims": 1}, name=f"{OUTPUT}/count")
    return ops.op("Div", [vector, _at_least(count, SMALLEST_COUNT, ops)], name=f"{OUTPUT}/mean")


def _normalized(vector: ir.Value, ops: tape.Tape) -> ir.Value:
    last = ops.op("Constant", [], {"value_ints": [-1]}, name=f"{OUTPUT}/last")
    length = ops.op("ReduceL2", [vector, last], {"keepdims": 1}, name=f"{OUTPUT}/length")
    divisor = _at_least(length, SMALLEST_LENGTH, ops)
    return ops.op("Div", [vector, divisor], name=f"{OUTPUT}/normalized")


def _at_least(value: ir.Value, smallest: float, ops: tape.Tape) -> ir.Value:
    step = ops.nodes[-1].name
    low = ops.op("Constant", [], {"value_float": smallest}, name=f"{step}/smallest")
    typed = ops.op("CastLike", [low, value], name=f"{step}/smallest_typed")
    return ops.op("Max", [value, typed], name=f"{step}/at_least")
