"""The custom gather ops: model-local functions whose bodies are stock ONNX.

A runtime that knows ``mtl_export::TaskDelta`` may replace it; all others inline it.

    TaskDelta(x, task_ids, down, core, up)      x [B, S, I]  ->  [B, S, O]
    TaskDeltaRows(x, task_ids, down, core, up)  x [B, I]     ->  [B, O]
        ((x . down) . core[task_ids]) . up
    TaskOwnDelta(x, task_ids, downs, ups)       x [B, S, I]  ->  [B, S, O]
    TaskOwnDeltaRows(x, task_ids, downs, ups)   x [B, I]     ->  [B, O]
        (x . downs[task_ids]) . ups[task_ids]
    TaskHeadRows(x, task_ids, weights, biases)  x [B, I]     ->  [B, L]
        x . weights[task_ids] + biases[task_ids]
    TaskHeadTokens(x, task_ids, weights, biases)  x [B, S, I]  ->  [B, S, L]
        the same for every position
    OneTaskHead(x, task_id, weights, biases)    x [..., I]   ->  [..., L]
        the same where the whole batch has one task
    TaskEmbeddingDelta(x, task_ids, starts, downs, ups)     x [B, S]  ->  [B, S, O]
        downs[starts[task_ids] + x] . ups[task_ids]
    TaskEmbeddingRows(x, task_ids, starts, table, slots)    x [B, S]  ->  [B, S, O]
        table[slots[starts[task_ids] + x]]
    TaskVectors(task_ids, rows)                 [B, 1, O];  TaskVectorRows  [B, O]
        rows[task_ids]
    TaskUp(z, cores, up)            z [B, S, D]            ->  [B, S, O]
        (z . cores) . up
    TaskComposedUp(z, cores, up)    the same
        z . (cores . up)
    TaskJoin(x, z, cores)           x [B, S, I]            ->  [B, S, I + U]
        [x, z . cores]
    TaskJoinBias(x, z, cores, ones)     ones [B, S, 1]     ->  [B, S, I + U + 1]
        [x, z . cores, 1]

task_ids int64 [B], task_id int64 []; down [I, D], core [T + 1, D, U], up [U, O];
downs [T + 1, I, R], ups [T + 1, R, O]; cores [B, D, U], each row's own; rows [T + 1, O];
weights [T + 1, I, L], biases [T + 1, L].
For embeddings of V entries, with int64 token ids x: starts [T + 1] = t V; downs [(T + 1) V, R];
slots int64 [(T + 1) V]; table [N, O].
With a scalar for task_ids, TaskDelta and TaskOwnDelta take x [..., I] and TaskVectorRows
returns [O].
TaskDelta costs two shared GEMMs and one gather of D x U numbers a row, whatever T is.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import names

TASK_DELTA = "TaskDelta"
TASK_DELTA_ROWS = "TaskDeltaRows"
TASK_OWN_DELTA = "TaskOwnDelta"
TASK_OWN_DELTA_ROWS = "TaskOwnDeltaRows"
TASK_HEAD_TOKENS = "TaskHeadTokens"
TASK_HEAD_ROWS = "TaskHeadRows"
ONE_TASK_HEAD = "OneTaskHead"
TASK_EMBEDDING_DELTA = "TaskEmbeddingDelta"
TASK_EMBEDDING_ROWS = "TaskEmbeddingRows"
TASK_VECTORS = "TaskVectors"
TASK_VECTOR_ROWS = "TaskVectorRows"
TASK_UP = "TaskUp"
TASK_COMPOSED_UP = "TaskComposedUp"
TASK_JOIN = "TaskJoin"
TASK_JOIN_BIAS = "TaskJoinBias"


def task_delta(opset: int) -> ir.Function:
    """Return ``TaskDelta``."""
    x, ids, down, core, up = inputs = _values("x", "task_ids", "down", "core", "up")
    body = tape.Tape()
    z = body.op("MatMul", [x, down])
    picked = body.op("Gather", [core, ids], {"axis": 0})
    y = body.op("MatMul", [body.op("MatMul", [z, picked]), up])
    return _function(TASK_DELTA, inputs, y, body, opset)


def task_delta_rows(opset: int) -> ir.Function:
    """Return ``TaskDeltaRows``."""
    x, ids, down, core, up = inputs = _values("x", "task_ids", "down", "core", "up")
    body = tape.Tape()
    axis = body.op("Constant", [], {"value_ints": [1]})
    z = body.op("Unsqueeze", [body.op("MatMul", [x, down]), axis])
    picked = body.op("Gather", [core, ids], {"axis": 0})
    mixed = body.op("Squeeze", [body.op("MatMul", [z, picked]), axis])
    y = body.op("MatMul", [mixed, up])
    return _function(TASK_DELTA_ROWS, inputs, y, body, opset)


def task_own_delta(opset: int) -> ir.Function:
    """Return ``TaskOwnDelta``."""
    x, ids, downs, ups = inputs = _values("x", "task_ids", "downs", "ups")
    body = tape.Tape()
    z = body.op("MatMul", [x, body.op("Gather", [downs, ids], {"axis": 0})])
    y = body.op("MatMul", [z, body.op("Gather", [ups, ids], {"axis": 0})])
    return _function(TASK_OWN_DELTA, inputs, y, body, opset)


def task_own_delta_rows(opset: int) -> ir.Function:
    """Return ``TaskOwnDeltaRows``."""
    x, ids, downs, ups = inputs = _values("x", "task_ids", "downs", "ups")
    body = tape.Tape()
    axis = body.op("Constant", [], {"value_ints": [1]})
    row = body.op("Unsqueeze", [x, axis])
    z = body.op("MatMul", [row, body.op("Gather", [downs, ids], {"axis": 0})])
    y = body.op(
        "Squeeze", [body.op("MatMul", [z, body.op("Gather", [ups, ids], {"axis": 0})]), axis]
    )
    return _function(TASK_OWN_DELTA_ROWS, inputs, y, body, opset)


def task_vectors(opset: int) -> ir.Function:
    """Return ``TaskVectors``."""
    ids, rows = inputs = _values("task_ids", "rows")
    body = tape.Tape()
    axis = body.op("Constant", [], {"value_ints": [1]})
    y = body.op("Unsqueeze", [body.op("Gather", [rows, ids], {"axis": 0}), axis])
    return _function(TASK_VECTORS, inputs, y, body, opset)


def task_vector_rows(opset: int) -> ir.Function:
    """Return ``TaskVectorRows``."""
    ids, rows = inputs = _values("task_ids", "rows")
    body = tape.Tape()
    y = body.op("Gather", [rows, ids], {"axis": 0})
    return _function(TASK_VECTOR_ROWS, inputs, y, body, opset)


def task_head_rows(opset: int) -> ir.Function:
    """Return ``TaskHeadRows``."""
    x, ids, weights, biases = inputs = _values("x", "task_ids", "weights", "biases")
    body = tape.Tape()
    axis = body.op("Constant", [], {"value_ints": [1]})
    picked = body.op("Gather", [weights, ids], {"axis": 0})
    rows = body.op("MatMul", [body.op("Unsqueeze", [x, axis]), picked])
    logits = body.op("Squeeze", [rows, axis])
    y = body.op("Add", [logits, body.op("Gather", [biases, ids], {"axis": 0})])
    return _function(TASK_HEAD_ROWS, inputs, y, body, opset)


def task_head_tokens(opset: int) -> ir.Function:
    """Return ``TaskHeadTokens``."""
    x, ids, weights, biases = inputs = _values("x", "task_ids", "weights", "biases")
    body = tape.Tape()
    axis = body.op("Constant", [], {"value_ints": [1]})
    logits = body.op("MatMul", [x, body.op("Gather", [weights, ids], {"axis": 0})])
    picked = body.op("Gather", [biases, ids], {"axis": 0})
    y = body.op("Add", [logits, body.op("Unsqueeze", [picked, axis])])
    return _function(TASK_HEAD_TOKENS, inputs, y, body, opset)


def one_task_head(opset: int) -> ir.Function:
    """Return ``OneTaskHead``."""
    x, task_id, weights, biases = inputs = _values("x", "task_id", "weights", "biases")
    body = tape.Tape()
    logits = body.op("MatMul", [x, body.op("Gather", [weights, task_id], {"axis": 0})])
    y = body.op("Add", [logits, body.op("Gather", [biases, task_id], {"axis": 0})])
    return _function(ONE_TASK_HEAD, inputs, y, body, opset)


def task_embedding_delta(opset: int) -> ir.Function:
    """Return ``TaskEmbeddingDelta``."""
    x, ids, starts, downs, ups = inputs = _values("x", "task_ids", "starts", "downs", "ups")
    body = tape.Tape()
    z = body.op("Gather", [downs, _place(body, x, ids, starts)], {"axis": 0})
    y = body.op("MatMul", [z, body.op("Gather", [ups, ids], {"axis": 0})])
    return _function(TASK_EMBEDDING_DELTA, inputs, y, body, opset)


def task_embedding_rows(opset: int) -> ir.Function:
    """Return ``TaskEmbeddingRows``."""
    x, ids, starts, table, slots = inputs = _values("x", "task_ids", "starts", "table", "slots")
    body = tape.Tape()
    slot = body.op("Gather", [slots, _place(body, x, ids, starts)], {"axis": 0})
    y = body.op("Gather", [table, slot], {"axis": 0})
    return _function(TASK_EMBEDDING_ROWS, inputs, y, body, opset)


def task_up(opset: int) -> ir.Function:
    """Return ``TaskUp``."""
    z, cores, up = inputs = _values("z", "cores", "up")
    body = tape.Tape()
    y = body.op("MatMul", [body.op("MatMul", [z, cores]), up])
    return _function(TASK_UP, inputs, y, body, opset)


def task_composed_up(opset: int) -> ir.Function:
    """Return ``TaskComposedUp``."""
    z, cores, up = inputs = _values("z", "cores", "up")
    body = tape.Tape()
    y = body.op("MatMul", [z, body.op("MatMul", [cores, up])])
    return _function(TASK_COMPOSED_UP, inputs, y, body, opset)


def task_join(opset: int) -> ir.Function:
    """Return ``TaskJoin``."""
    x, z, cores = inputs = _values("x", "z", "cores")
    body = tape.Tape()
    y = body.op("Concat", [x, body.op("MatMul", [z, cores])], {"axis": -1})
    return _function(TASK_JOIN, inputs, y, body, opset)


def task_join_bias(opset: int) -> ir.Function:
    """Return ``TaskJoinBias``."""
    x, z, cores, ones = inputs = _values("x", "z", "cores", "ones")
    body = tape.Tape()
    y = body.op("Concat", [x, body.op("MatMul", [z, cores]), ones], {"axis": -1})
    return _function(TASK_JOIN_BIAS, inputs, y, body, opset)


def _place(body: tape.Tape, x: ir.Value, ids: ir.Value, starts: ir.Value) -> ir.Value:
    """Return ``starts[task_ids] + x``, one start for each row of x."""
    axis = body.op("Constant", [], {"value_ints": [1]})
    own = body.op("Unsqueeze", [body.op("Gather", [starts, ids], {"axis": 0}), axis])
    return body.op("Add", [own, x])


FUNCTIONS = {
    TASK_DELTA: task_delta,
    TASK_DELTA_ROWS: task_delta_rows,
    TASK_OWN_DELTA: task_own_delta,
    TASK_OWN_DELTA_ROWS: task_own_delta_rows,
    TASK_HEAD_TOKENS: task_head_tokens,
    TASK_HEAD_ROWS: task_head_rows,
    ONE_TASK_HEAD: one_task_head,
    TASK_EMBEDDING_DELTA: task_embedding_delta,
    TASK_EMBEDDING_ROWS: task_embedding_rows,
    TASK_VECTORS: task_vectors,
    TASK_VECTOR_ROWS: task_vector_rows,
    TASK_UP: task_up,
    TASK_COMPOSED_UP: task_composed_up,
    TASK_JOIN: task_join,
    TASK_JOIN_BIAS: task_join_bias,
}


def _values(*value_names: str) -> list[ir.Value]:
    return [ir.Value(name=name) for name in value_names]


def _function(
    name: str, inputs: Sequence[ir.Value], output: ir.Value, body: tape.Tape, opset: int
) -> ir.Function:
    output.name = "y"
    for index, node in enumerate(body.nodes):
        node.name = f"{name}/{index}"
        for result in node.outputs:
            result.name = result.name or f"v{index}"
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset}, name=name)
    return ir.Function(names.DOMAIN, name, graph=graph, attributes=())
