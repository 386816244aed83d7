"""MTLoRA on Swin: a task's layer has two inputs, so there is no normal form of one layer.

    y_t = W x + b + s_t B_t A_t z_t        (mode matrixv2: + s B A x)

No weight W_t on the task's own z_t alone gives that. The whole model is folded and exported by
``mtl_export.dense``; its forward pass is ``mtl_export.adapters.modules.mtlora_swin``.

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
    """Refuse: there is no normal form of one layer; ``folded`` takes the whole model.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        f"{layer.module}: MTLoRA (Swin) has no weight per layer and task",
        expected="the trainer's own ckpt_epoch_<N>.pth, from which the whole model is exported",
        fix="Point --checkpoint at that file",
    )
