"""The only place that invents ONNX names.

Initializers of the base keep their state-dict names. What we add:

    <module>.weight_t   base weight transposed to [I, O], so that MatMul takes it as it is and
                        quantisers recognise a stock linear layer
    <module>.down       [I, D]           <module>.core   [T + 1, D, U]      <module>.up   [U, O]
    <module>.weights    [T + 1, I, L]    <module>.biases [T + 1, L]         (per-task heads)
    <module>.downs      [T + 1, I, R]        <module>.ups    [T + 1, R, O]         (own factors)
    <module>.gain, .biases  [T + 1, O]       (DoRA; trained biases)
    <module>.starts     [T + 1]              <module>.table  [N, O]    <module>.slots [(T + 1) V]
                        (embeddings of V entries, whose downs are [(T + 1) V, R])
    <module>.absent     [T + 1, 1]       (an output of some tasks: 0 for these, else -inf)
    <module>/<step>     values between nodes
    <module>@2/<step>   the same where the model uses the module for the second time

Row T of every per-task stack is NaN: see ``passes.route_tasks``.
"""

from __future__ import annotations

from mtl_export.names import TASK_IDS

# What graphs are written in, and what they can be: PyTorch's exporter writes 18 at least, and
# onnxscript's converter knows 25 at most.
OPSET, OLDEST_OPSET, NEWEST_OPSET = 20, 18, 25
DOMAIN = "mtl_export"
DOMAIN_VERSION = 1
MARKER_LINEAR = "TaskLinear"
MARKER_HEAD = "TaskHead"
MARKER_EMBEDDING = "TaskEmbedding"
MARKER_NORM = "TaskNorm"
MARKER_OUTPUT = "TaskOutput"
MODULE_ATTRIBUTE = "module"
# The step that lets an output through for the tasks whose answer it is.
ANSWERS = "answers"
ROWS_ATTRIBUTE = "rows"
# Which use of a module this is, and of how many; on modules that a model runs several times.
USE_ATTRIBUTE = "use"
# The comparison that finds ids which need more than 24 bits.
NEAR = f"{TASK_IDS}/near"
BATCH = "batch"
SEQUENCE = "sequence"


def weight_t(module: str) -> str:
    """Return the name of a transposed weight."""
    return f"{module}.weight_t"


def bias(module: str) -> str:
    """Return the name of a bias."""
    return f"{module}.bias"


def part(module: str, name: str) -> str:
    """Return the name of one of our initializers of ``module``."""
    return f"{module}.{name}"


def used(module: str, use: int) -> str:
    """Return the name of one use of a module: its own, then ``module@2`` and so on."""
    return module if use == 1 else f"{module}@{use}"


def value(module: str, step: str) -> str:
    """Return the name of an intermediate value of ``module``."""
    return f"{module}/{step}"
