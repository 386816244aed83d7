"""Multiply each row's core into the up-projection first, where that leaves less to do.

    (z . core) . up    ->    z . (core . up)        S U (D + O)  against  D U O + S D O  a row

With U columns of up against D of z, a row of S tokens saves S O (U - D) products and costs
D U O: worth it from U = 4 D and a dozen tokens on.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import functions, names
from mtl_export.graph.passes.calls import calls, declare, drop_uncalled, inputs_of, replace


class ComposedUpPass(ir.passes.InPlacePass):
    """Replace ``TaskUp`` by ``TaskComposedUp`` where up is much wider than z.

    Cases
        1. ``TaskUp(z, cores, up)``, U >= 4 D  ->  ``TaskComposedUp(z, cores, up)``
        2. one token a row, as in the decoding step of a language model: left as it is.
        3. U < 4 D: left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite what matches."""
        found = [node for node in calls(model, functions.TASK_UP) if _is_cheaper(node)]
        for node in found:
            ops = tape.Tape(model.graph)
            y = ops.op(
                functions.TASK_COMPOSED_UP, inputs_of(node), domain=names.DOMAIN, name=node.name
            )
            replace(node, ops, y)
        if found:
            declare(model, functions.TASK_COMPOSED_UP)
            drop_uncalled(model)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_cheaper(node: ir.Node) -> bool:
    z, _, up = inputs_of(node)
    if z.shape is None or up.shape is None or z.shape[-2] == 1:
        return False
    width, columns = z.shape[-1], up.shape[0]
    return isinstance(width, int) and isinstance(columns, int) and columns >= 4 * width
