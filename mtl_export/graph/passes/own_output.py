"""Leave a merged graph the output that is its task's answer."""

from __future__ import annotations

import onnx_ir as ir

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.names import LOGITS


class OwnOutputPass(ir.passes.InPlacePass):
    """Drop the outputs of other kinds of heads from one task's graph.

    Cases
        1. all tasks share the model's outputs: nothing to do.
        2. the task's output holds logits: it is called ``logits``, as in any merged graph.
        3. it is the hidden states: it keeps its name.

    What the others were computed from is left for ``RemoveUnusedNodesPass``.

    Args:
        task: Whose graph it is.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drop what is not the task's."""
        if not self._task.output:
            return ir.passes.PassResult(model, modified=False)
        outputs = model.graph.outputs
        own = next(value for value in outputs if value.name == self._task.output)
        outputs.clear()
        outputs.append(own)
        own.name = LOGITS if self._task.labels else own.name
        return ir.passes.PassResult(model, modified=True)
