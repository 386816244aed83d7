"""The catalogue of families: one paper, one row, one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mtl_export.adapters import (
    adapterhub_dora,
    dora,
    ia3,
    kasa,
    lora,
    moe_lora,
    mtl_lora,
    mtl_lora_fused,
    mtlora_swin,
    multi_lora,
    olora,
    pissa,
    ta_lora,
)
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.lazy import LAZY_BYTES, LazyLayers
from mtl_export.adapters.normal_form import AdapterSet, AnyAdapter, Head, Rows, filled_heads
from mtl_export.adapters.preflight import read_all
from mtl_export.adapters.stack import stacked
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import (
    Checkpoint,
    HeadTensors,
    LayerTensors,
    bare_modules,
    last_modules,
)
from mtl_export.checkpoint.own_classes import check_switches
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError, shortened


@dataclass(frozen=True, slots=True)
class Family:
    """One paper.

    Attributes:
        name: What ``Checkpoint.family`` says.
        title: The method's name, for people.
        paper: Where it is published.
        layer_adapter: Turns one layer's tensors into the normal form; the second argument
            reads the base layer, which only some families (DoRA) need.
        oracle: ``"module:class"`` of the paper's forward pass in PyTorch, imported only
            by training and parity, so that merging needs no torch. The class has
            ``from_tensors(base, routing, layer)``. Empty where ``layer_adapter`` refuses
            the family, which only ``inspect`` knows.
    """

    name: str
    title: str
    paper: str
    layer_adapter: Callable[[LayerTensors, BaseLayer], AnyAdapter]
    oracle: str


FAMILIES: tuple[Family, ...] = (
    Family(
        name=mtl_lora.NAME,
        title="MTL-LoRA",
        paper="https://doi.org/10.1609/AAAI.V39I20.35509",
        layer_adapter=mtl_lora.layer_adapter,
        oracle="mtl_export.adapters.modules.mtl_lora:MTLLoRALinear",
    ),
    Family(
        name=mtl_lora_fused.NAME,
        title="MTL-LoRA on a fused projection",
        paper="https://doi.org/10.1609/AAAI.V39I20.35509",
        layer_adapter=mtl_lora_fused.layer_adapter,
        oracle="mtl_export.adapters.modules.mtl_lora_fused:MTLLoRAFusedLinear",
    ),
    Family(
        name=moe_lora.NAME,
        title="MoE-LoRA gated by the task id",
        paper="https://arxiv.org/abs/2310.18339",
        layer_adapter=moe_lora.layer_adapter,
        oracle="mtl_export.adapters.modules.moe_lora:MoELoRALinear",
    ),
    Family(
        name=multi_lora.NAME,
        title="MultiLoRA",
        paper="https://arxiv.org/abs/2311.11501",
        layer_adapter=multi_lora.layer_adapter,
        oracle="mtl_export.adapters.modules.multi_lora:MultiLoRALinear",
    ),
    Family(
        name=ta_lora.NAME,
        title="TA-LoRA",
        paper="https://doi.org/10.1609/AAAI.V39I20.35509",
        layer_adapter=ta_lora.layer_adapter,
        oracle="mtl_export.adapters.modules.ta_lora:TALoRALinear",
    ),
    Family(
        name=lora.NAME,
        title="LoRA",
        paper="https://arxiv.org/abs/2106.09685",
        layer_adapter=lora.layer_adapter,
        oracle="mtl_export.adapters.modules.lora:LoRALinear",
    ),
    Family(
        name=dora.NAME,
        title="DoRA",
        paper="https://arxiv.org/abs/2402.09353",
        layer_adapter=dora.layer_adapter,
        oracle="mtl_export.adapters.modules.dora:DoRALinear",
    ),
    Family(
        name=kasa.NAME,
        title="KaSA",
        paper="https://arxiv.org/abs/2412.06071",
        layer_adapter=kasa.layer_adapter,
        oracle="mtl_export.adapters.modules.kasa:KaSALinear",
    ),
    Family(
        name=pissa.NAME,
        title="PiSSA",
        paper="https://arxiv.org/abs/2404.02948",
        layer_adapter=pissa.layer_adapter,
        oracle="mtl_export.adapters.modules.pissa:PiSSALinear",
    ),
    Family(
        name=olora.NAME,
        title="OLoRA",
        paper="https://arxiv.org/abs/2406.01775",
        layer_adapter=olora.layer_adapter,
        oracle="mtl_export.adapters.modules.olora:OLoRALinear",
    ),
    Family(
        name=adapterhub_dora.NAME,
        title="DoRA as AdapterHub computes it",
        paper="https://arxiv.org/abs/2402.09353",
        layer_adapter=adapterhub_dora.layer_adapter,
        oracle="mtl_export.adapters.modules.adapterhub_dora:AdapterHubDoRALinear",
    ),
    Family(
        name=ia3.NAME,
        title="(IA)^3",
        paper="https://arxiv.org/abs/2205.05638",
        layer_adapter=ia3.layer_adapter,
        oracle="mtl_export.adapters.modules.ia3:IA3Linear",
    ),
    Family(
        name=mtlora_swin.NAME,
        title="MTLoRA (Swin)",
        paper="https://arxiv.org/abs/2403.20320",
        layer_adapter=mtlora_swin.layer_adapter,
        oracle="",
    ),
)
# Families whose layers cost little more than reading their tensors: no base weight is needed.
CHEAP = frozenset(
    {mtl_lora.NAME, mtl_lora_fused.NAME, moe_lora.NAME, multi_lora.NAME, ta_lora.NAME, lora.NAME}
)


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        AdapterError: There is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise AdapterError(
        f"adapter type {name!r}: no family of that name",
        expected=f"one of {', '.join(family.name for family in FAMILIES)}",
        fix="Export this checkpoint with a version of mtl-export that knows it",
    )


def read_adapters(checkpoint: Checkpoint, base: BaseModel | None = None) -> AdapterSet:
    """Return ``checkpoint`` in normal form; its adapter tensors are read here.

    Args:
        checkpoint: What ``open_checkpoint`` returned.
        base: The base model; needed only by families whose normal form depends on it.

    Raises:
        CheckpointError: A tensor is missing, misshaped, or not finite.
        HyperparameterError: alpha, temperature or a switch of the model class is unknown.
        AdapterError: The family is unknown.
        BaseModelError: The family needs the base, and it was not given.
    """
    if checkpoint.members:
        by_task = {member.tasks[0].name: member for member in checkpoint.members}
        members = read_all(
            str(checkpoint.path), by_task, lambda name: read_adapters(by_task[name], base)
        )
        return stacked(checkpoint, list(members.values()), base)
    family = family_named(checkpoint.family)
    layers = _layers(family, checkpoint, base)
    check_switches(checkpoint.model_class, checkpoint.layers)
    return AdapterSet(
        family=family.name,
        tasks=checkpoint.tasks,
        layers=layers,
        heads=MappingProxyType(
            {
                module: filled_heads(
                    [None if head is None else _head(head) for head in heads],
                    is_last=module in last_modules(checkpoint.readouts),
                )
                for module, heads in checkpoint.heads.items()
            }
        ),
        model_class=checkpoint.model_class,
        checkpoint_sha256=checkpoint.sha256,
        replaced=MappingProxyType(
            {name: tensor.widened() for name, tensor in checkpoint.replaced.items()}
        ),
        rows=MappingProxyType(
            {
                name: (Rows(np.array(rows.indices, np.int64), rows.values.widened()),)
                * len(checkpoint.tasks)
                for name, rows in checkpoint.rows.items()
            }
        ),
        bare_outputs=bare_modules(checkpoint.readouts),
    )


def _layers(
    family: Family, checkpoint: Checkpoint, base: BaseModel | None
) -> Mapping[str, AnyAdapter]:
    def load(module: str) -> AnyAdapter:
        return _layer(family, checkpoint.layers[module], base)

    bad = _not_finite(checkpoint)
    size = sum(t.size_bytes for layer in checkpoint.layers.values() for t in layer.tensors.values())
    if family.name in CHEAP and size > LAZY_BYTES and not bad:
        return LazyLayers.of(checkpoint.layers, load)
    finite = [
        module
        for module, layer in checkpoint.layers.items()
        if not any(tensor.name in bad for tensor in layer.tensors.values())
    ]
    error = _not_finite_error(checkpoint, bad) if bad else None
    return MappingProxyType(read_all(str(checkpoint.path), finite, load, error))


def _layer(family: Family, layer: LayerTensors, base: BaseModel | None) -> AnyAdapter:
    base_layer = BaseLayer(layer.module, base, layer.embedding)
    adapter = family.layer_adapter(layer, base_layer)
    return dataclasses.replace(adapter, transposed=base_layer.stored_transposed)


def _head(tensors: HeadTensors) -> Head:
    weight = tensors.weight.widened()
    bias: Array = (
        np.zeros(weight.shape[0], weight.dtype) if tensors.bias is None else tensors.bias.widened()
    )
    return Head(weight, bias)


def _not_finite(checkpoint: Checkpoint) -> dict[str, str]:
    """Return where NaN or Inf is, by tensor name."""
    tensors = [t for layer in checkpoint.layers.values() for t in layer.tensors.values()]
    tensors += checkpoint.replaced.values()
    tensors += [rows.values for rows in checkpoint.rows.values()]
    for heads in checkpoint.heads.values():
        tensors += [t for head in heads if head for t in (head.weight, head.bias) if t]
    bad = {}
    for tensor in tensors:
        finite = np.isfinite(tensor.widened())
        if not finite.all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            bad[tensor.name] = f"{int((~finite).sum())} values, first at {list(first)}"
    return bad


def _not_finite_error(checkpoint: Checkpoint, bad: Mapping[str, str]) -> CheckpointError:
    found = shortened(f"{name!r} ({where})" for name, where in bad.items())
    return CheckpointError(
        f"{checkpoint.path}: NaN or Inf in {found}",
        expected="finite numbers",
        fix="Export an earlier checkpoint of the run, from before it diverged",
    )
