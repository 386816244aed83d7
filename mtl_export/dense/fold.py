"""MTLoRA on Swin: what of a trained model folds into plain weights, and what stays beside them.

D = s B A is the shared update, U_t = s_t B_t A_t a task's; x the shared stream, z_t the task's.

    layers without task terms     W + D                          one weight: qkv, early blocks
    task layers, mode matrix      shared (W + D) x               task  W x + U_t z_t
    task layers, mode matrixv2    shared (W + D) x               task  (W + D) x + U_t z_t
    task layers, mode addition    shared W x + LN(sum_t y_t)     task  y_t = W x + U_t z_t

No W_t on z_t alone gives y_t, so in the last block of each stage the task keeps a thin second
stream: ``StreamLinear`` computes W x once and adds U_t z_t at rank r_t. In mode addition every
task's stream feeds the shared one, so one task's model holds them all. Batch normalisations of the
heads fold into the convolutions before them, the factor of q into its weights. Products are
computed in float64.

Source: Agiza, Neseem, Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task
Learning", CVPR 2024, arXiv:2403.20320; https://github.com/scale-lab/MTLoRA/tree/333a375.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mtl_export.adapters.modules.mtlora_layers import SwinModel
from mtl_export.adapters.modules.mtlora_swin import COMPUTED

Tensors = Mapping[str, torch.Tensor]
BATCH_NORM_EPSILON = 1e-5
_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.(.+)")
_OF_TASK = re.compile(r"(?:downsampler|decoders\.decoders)\.([^.]+)\..+")
_DEAD = re.compile(r".*(?:\.num_batches_tracked|\.conv_seg\.(?:weight|bias))")


@dataclass(frozen=True)
class LayerFold:
    """How one adapted layer folds.

    Attributes:
        name: The layer's.
        kept: What stays beside its weight: ``""`` (nothing), ``streams`` or ``streams and norm``.
        ranks: r_t of the tasks' updates that stay.
        shared_rank: r of the shared update, folded or not; 0 without one.
    """

    name: str
    kept: str
    ranks: tuple[int, ...] = ()
    shared_rank: int = 0


def layer_folds(tensors: Tensors, model: SwinModel) -> list[LayerFold]:
    """Return how each adapted layer of a checkpoint folds, in the checkpoint's order."""
    names = [name.removesuffix(".linear.weight") for name in tensors if _is_adapted(name)]
    folds = []
    for name in names:
        shared = tensors.get(f"{name}.lora_shared_A")
        rank = 0 if shared is None else shared.shape[0]
        if not _is_alive(tensors, name, model):
            folds.append(LayerFold(name, "", shared_rank=rank))
            continue
        ranks = tuple(tensors[f"{name}.lora_tasks_A.{task}"].shape[0] for task in model.tasks)
        has_norm = f"{name}.lora_norm.weight" in tensors
        kept = "streams and norm" if has_norm else "streams"
        folds.append(LayerFold(name, kept, ranks, rank))
    return folds


def folded(
    tensors: Tensors, model: SwinModel, tasks: Sequence[str]
) -> tuple[dict[str, torch.Tensor], SwinModel]:
    """Return the tensors of a model without adapters that answers ``tasks``, and its description.

    Args:
        tensors: The checkpoint's, by name.
        model: What describes them.
        tasks: Tasks to answer, in the order of the outputs; the others' tensors are left out.

    Returns:
        float32 tensors for ``MTLoRASwin.from_tensors``, and the description that goes with them.
    """
    is_addition = model.mode == "addition"
    streams = model.tasks if is_addition else tuple(tasks)
    found: dict[str, torch.Tensor] = {}
    adapted = []
    for name, value in tensors.items():
        of_task = _OF_TASK.fullmatch(name)
        if _is_adapted(name):
            adapted.append(name.removesuffix(".linear.weight"))
        elif not (".lora_" in name or ".linear.bias" in name or name.endswith(COMPUTED)) and not (
            _DEAD.fullmatch(name) or (of_task and of_task[1] not in tasks)
        ):
            found[name] = value.double()
    for name in adapted:
        found |= _layer(tensors, name, model, streams)
    for name in [key for key in found if key.endswith(".attn.qkv.weight")]:
        _scale_queries(found, name.removesuffix(".weight"), model.qk_scale)
    _fold_batch_norms(found)
    _fold_reductions(found, tasks)
    described = replace(
        model, tasks=tuple(tasks), streams=streams, shared_scales=(), task_scales=None, qk_scale=1.0
    )
    return {name: value.float().contiguous() for name, value in found.items()}, described


def _is_adapted(name: str) -> bool:
    return name.startswith("backbone.") and name.endswith(".linear.weight")


def _has_tasks(tensors: Tensors, name: str, model: SwinModel) -> bool:
    return f"{name}.lora_tasks_A.{model.tasks[0]}" in tensors


def _is_alive(tensors: Tensors, name: str, model: SwinModel) -> bool:
    """Return whether the layer's task terms reach an output."""
    if not _has_tasks(tensors, name, model):
        return False
    if model.mode == "addition":
        return True  # through the shared stream's norm
    match = _BLOCK.fullmatch(name)
    if match is None:
        return False
    stage, block = match[1], int(match[2])
    is_last = f"backbone.layers.{stage}.blocks.{block + 1}.norm1.weight" not in tensors
    consumer = f"backbone.layers.{stage}.blocks.{block}.mlp.fc2"
    return is_last and _has_tasks(tensors, consumer, model)


def _layer(
    tensors: Tensors, name: str, model: SwinModel, streams: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return one adapted layer's folded tensors, by full name."""

    def stored(key: str) -> torch.Tensor | None:
        value = tensors.get(f"{name}.{key}")
        return None if value is None else value.double()

    stage = int(name.split(".")[2])
    weight, bias = tensors[f"{name}.linear.weight"].double(), stored("linear.bias")
    values = {"weight": weight} | ({} if bias is None else {"bias": bias})
    down, up = stored("lora_shared_A"), stored("lora_shared_B")
    if up is not None:
        trained = stored("lora_shared_scale")
        up = up * (model.shared_scales[stage] if trained is None else trained)
    is_alive = _is_alive(tensors, name, model)
    is_read = _is_shared_output_read(tensors, name)
    if down is not None and up is not None:
        if not is_alive or model.mode == "matrixv2":
            values["weight"] = weight + up @ down
        elif is_read and down.shape[0] * sum(weight.shape) >= weight.numel():
            values["shared_weight"] = weight + up @ down
        elif is_read:
            values |= {"shared_down": down.T, "shared_up": up.T}
    if is_alive:
        scales = model.task_scales or {}
        pairs = []
        for task in streams:
            trained = stored(f"lora_task_scale.{task}")
            factor = scales[task][stage] if trained is None else trained
            task_up = tensors[f"{name}.lora_tasks_B.{task}"].double() * factor
            pairs.append((tensors[f"{name}.lora_tasks_A.{task}"].double(), task_up))
        rank = max(1, *(a.shape[0] for a, _ in pairs))
        values["task_down"] = torch.stack([_filled(a, rank, 0).T for a, _ in pairs]).unsqueeze(1)
        values["task_up"] = torch.stack([_filled(b, rank, 1).T for _, b in pairs]).unsqueeze(1)
        for key in ("lora_norm.weight", "lora_norm.bias"):
            norm = stored(key)
            values |= {} if norm is None else {key: norm}
    return {f"{name}.{key}": value for key, value in values.items()}


def _filled(matrix: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """Return the matrix with zeros up to ``rank`` along ``axis``, which changes no product."""
    shape = list(matrix.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], axis)


def _is_shared_output_read(tensors: Tensors, name: str) -> bool:
    """Return whether anything reads the shared output: all but the very last layer's."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[3] != "mlp.fc2":
        return True
    stage, block = int(match[1]), int(match[2])
    return (
        f"backbone.layers.{stage}.blocks.{block + 1}.norm1.weight" in tensors
        or f"backbone.layers.{stage + 1}.blocks.0.norm1.weight" in tensors
    )


def _scale_queries(found: dict[str, torch.Tensor], name: str, scale: float | None) -> None:
    table = found[f"{name.removesuffix('qkv')}relative_position_bias_table"]
    width = found[f"{name}.weight"].shape[0] // 3
    factor = (width // table.shape[1]) ** -0.5 if scale is None else scale
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in found:
            found[key] = torch.cat([found[key][:width] * factor, found[key][width:]])


def _fold_reductions(found: dict[str, torch.Tensor], tasks: Sequence[str]) -> None:
    """Fold patch merging into the downsamplers of the stages whose tasks have a stream.

    Nothing but a task's 1x1 convolution reads its merged features, and both are linear.
    """
    for key in [name for name in found if name.endswith(".downsample.reduction.weight")]:
        stage = int(key.split(".")[2])
        last = max(
            int(m[2]) for name in found if (m := _BLOCK.fullmatch(name)) and int(m[1]) == stage
        )
        if f"backbone.layers.{stage}.blocks.{last}.mlp.fc2.task_down" not in found:
            continue
        for task in tasks:
            name = f"downsampler.{task}.downsample_{stage}.weight"
            if name in found:
                found[name] = (found[name][:, :, 0, 0] @ found[key])[:, :, None, None]


def _fold_batch_norms(found: dict[str, torch.Tensor]) -> None:
    """Fold each batch normalisation into the convolution before it."""
    for key in [name for name in found if name.endswith(".running_mean")]:
        norm = key.removesuffix(".running_mean")
        parent, _, place = norm.rpartition(".")
        before = f"{parent}.conv" if place == "bn" else f"{parent}.{int(place) - 1}"
        weight, bias = fuse_conv_bn_weights(
            found[f"{before}.weight"],
            found.get(f"{before}.bias"),
            found.pop(key),
            found.pop(f"{norm}.running_var"),
            BATCH_NORM_EPSILON,
            found.pop(f"{norm}.weight"),
            found.pop(f"{norm}.bias"),
            transpose=".deconv_layers." in norm,
        )
        found[f"{before}.weight"], found[f"{before}.bias"] = weight.data, bias.data
