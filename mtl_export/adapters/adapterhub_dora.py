"""DoRA as AdapterHub computes it: no scale in the norm, and the bias is lengthened too.

    g = m / ||W + B A||        h = g . (W x + b + s B A x)

A [r, I], B [O, r], m [O]; ||.|| is the L2 norm of each row, one per output; s = alpha / r.
The paper (``mtl_export.adapters.dora``) has s inside the norm and leaves b alone, so the
two agree only where s = 1 and b = 0.

Source: ``LoRALinear.forward``, ``compute_dora_norm`` and ``compute_dora_deltaw`` in
adapters 1.3.0, src/adapters/methods/lora.py, https://github.com/adapter-hub/adapters.
That library's own ``merge_adapter`` uses neither s nor g on the bias and so differs from
its forward pass, which is what was trained and what is computed here.

| AdapterHub | role here | shape  |
|------------|-----------|--------|
| lora_A     | down      | [r, I] |
| lora_B     | up        | [O, r] |
| m.weight   | magnitude | [O]    |

Normal form: LoRA's, with gain = g and bias g . b.
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters import lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.dora import checked_gain
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.errors import CheckpointError

NAME = "adapterhub_dora"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one layer; the norm and the bias need the base.

    Raises:
        HyperparameterError: ``scaling`` is unknown.
        CheckpointError: A tensor is missing, the shapes contradict each other or the base,
            or a row of W + B A has no length.
        BaseModelError: There is no base.
    """
    values = checked_values(layer, {**lora.ROLES, "magnitude": "O"})
    down, up = values["down"].astype(np.float64), values["up"].astype(np.float64)
    weight, product = base.weight().astype(np.float64), up @ down
    if weight.shape != product.shape:
        raise CheckpointError(
            f"{layer.module}: the base weight is {list(weight.shape)}",
            expected=str(list(product.shape)),
            fix="Pass the base that the adapter was trained on to --base",
        )
    gain = checked_gain(layer.module, values["magnitude"], weight + product, "W + B A")
    rank, kept = down.shape[0], base.bias()
    return LayerAdapter(
        module=layer.module,
        down=values["down"],
        core=lora.one_core(lora.scaling_of(layer, rank), rank),
        up=values["up"],
        gain=gain,
        bias=None if kept is None else gain * kept.astype(np.float64),
    )
