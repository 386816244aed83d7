"""(IA)^3: a trained vector rescales each output of a layer, its bias included.

    h = s l . (W x + b)

l [O]; s is a fixed factor, 1 in the paper.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", NeurIPS 2022, arXiv:2205.05638, section 3.3, for keys, values and the
widening feed-forward layer; AdapterHub's ``IA3Config`` adds the factor s = alpha.
Rescaling the inputs of a layer instead, as some do for feed-forward layers, is another
method and not this one.

| paper | role here | shape |
|-------|-----------|-------|
| l     | scale     | [O]   |

``hyper`` may hold ``scaling``; without it s = 1.

Normal form: no low-rank part; gain = s l and bias s l . b.
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import OwnAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.errors import HyperparameterError

NAME = "ia3"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> OwnAdapter:
    """Return the normal form of one layer; the base tells its inputs and its bias.

    Raises:
        HyperparameterError: ``scaling`` is not finite.
        CheckpointError: ``scale`` is missing, or does not fit the base layer.
        BaseModelError: There is no base.
    """
    out_features, in_features = base.weight().shape
    fix = "Pass the base that the adapter was trained on to --base"
    values = checked_values(layer, {"scale": str(out_features)}, fix=fix)
    scaling = layer.hyper.get("scaling", 1.0)
    if not np.isfinite(scaling):
        raise HyperparameterError(
            layer.module,
            "scaling",
            f"{scaling}",
            expected="a finite number",
            fix="Correct alpha in the adapter's config",
        )
    gain = scaling * values["scale"].astype(np.float64)[None]
    kept = base.bias()
    return OwnAdapter(
        module=layer.module,
        in_features=in_features,
        out_features=out_features,
        blocks=(None,),
        gain=gain,
        bias=None if kept is None else gain * kept.astype(np.float64),
    )
