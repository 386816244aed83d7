"""MTLoRA on Swin: read and described, not yet exported.

In the last block of a stage a task's output is a linear map of two inputs, the shared
stream x and the task's own z_t:

    y_t = W x + b + s_t B_t A_t z_t        (mode matrixv2: + s B A x)

No weight W_t on z_t alone gives that, so the normal form of one layer cannot hold it: the
task needs a second stream through these blocks.

Source: Agiza, Neseem, Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task
Learning", CVPR 2024, arXiv:2403.20320; https://github.com/scale-lab/MTLoRA/tree/333a375.
"""

from __future__ import annotations

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.errors import AdapterError

NAME = "mtlora_swin"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Refuse: there is no normal form of one layer.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        f"{layer.module}: MTLoRA (Swin) is not supported yet",
        expected="an adapter whose task layers have one input: no merged weight gives two streams",
        fix="Use mtl-export inspect, which reads it; every other command refuses it for now",
    )
