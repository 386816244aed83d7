"""The linear layers of MTLoRA: as trained, and folded.

    y   = W x + b + s B A x                          shared          (mode matrix, matrixv2)
    y_t = W x + b + s_t B_t A_t z_t                  task t          (mode matrix)
    y_t = W x + b + s B A x + s_t B_t A_t z_t        task t          (mode matrixv2)
    y   = W x + b + LN(sum_t y_t)                    shared          (mode addition)

with x the shared input and z_t the task's own. The frozen weight never sees z_t, so y_t is no
linear map of z_t and no merged weight gives it. The scales are not divided by the rank. Streams of
all tasks travel as one tensor ``[T, B, L, C]``.

Source: Agiza, Neseem, Reda, "MTLoRA", CVPR 2024, arXiv:2403.20320, section 3; behaviour where the
paper is silent: https://github.com/scale-lab/MTLoRA/tree/333a375, models/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.dense_heads import Shapes

Streams = torch.Tensor | None  # [T, B, L, C]; None where a stage has no task features


@dataclass(frozen=True)
class SwinModel:
    """What decides the numbers beside the tensors.

    Attributes:
        tasks: In the order of the outputs.
        image_size: Side of the image in pixels.
        mode: ``matrix``, ``matrixv2`` or ``addition``: how layers with task terms compute.
        shared_scales: s by stage, where it was not trained.
        task_scales: s_t by task, then by stage.
        qk_scale: Factor of q in attention; None for 1 / sqrt(width of a head).
        streams: Tasks whose terms the layers hold, in order; ``tasks`` if empty.
    """

    tasks: tuple[str, ...]
    image_size: int
    mode: str = "matrix"
    shared_scales: tuple[float, ...] = ()
    task_scales: Mapping[str, tuple[float, ...]] | None = None
    qk_scale: float | None = None
    streams: tuple[str, ...] = ()


class PlainLinear(nn.Linear):
    """A linear layer of the shared stream alone."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, z: Streams = None
    ) -> tuple[torch.Tensor, Streams]:
        """Return ``W x + b``, and no task features."""
        return super().forward(x), None


class MTLoRALinear(nn.Module):
    """A linear layer as trained: one A, B per task, each of its own rank.

    Args:
        shapes: Shapes of the checkpoint's tensors by name.
        name: The layer's.
        stage: Its stage, which chooses the scales.
        model: The rest.

    Shape:
        x ``[..., I]``, z ``[T, ..., I]`` or None for x; result ``[..., O]``, ``[T, ..., O]``.
    """

    def __init__(self, shapes: Shapes, name: str, stage: int, model: SwinModel) -> None:
        super().__init__()

        def parameter(key: str) -> nn.Parameter | None:
            shape = shapes.get(f"{name}.{key}")
            return None if shape is None else nn.Parameter(torch.zeros(*shape))

        outputs, inputs = shapes[f"{name}.linear.weight"]
        self.linear = nn.Linear(inputs, outputs, bias=f"{name}.linear.bias" in shapes)
        self.lora_shared_A = parameter("lora_shared_A")
        self.lora_shared_B = parameter("lora_shared_B")
        self.tasks = [t for t in model.tasks if f"{name}.lora_tasks_A.{t}" in shapes]
        if self.tasks:
            self.lora_tasks_A, self.lora_tasks_B = (
                nn.ParameterDict({task: parameter(f"{side}.{task}") for task in self.tasks})
                for side in ("lora_tasks_A", "lora_tasks_B")
            )
        self.lora_norm = nn.LayerNorm(outputs) if f"{name}.lora_norm.weight" in shapes else None
        self.lora_shared_scale = parameter("lora_shared_scale")
        trained = {task: parameter(f"lora_task_scale.{task}") for task in self.tasks}
        if any(value is not None for value in trained.values()):
            self.lora_task_scale = nn.ParameterDict(trained)
        self.mode = model.mode if self.tasks else "matrix"
        self.shared_scale = model.shared_scales[stage]
        scales = model.task_scales or {}
        self.task_scales = {task: scales[task][stage] for task in self.tasks}

    def forward(self, x: torch.Tensor, z: Streams = None) -> tuple[torch.Tensor, Streams]:
        """Return the shared output and the tasks'."""
        frozen = self.linear(x)
        tasks = self._task_outputs(frozen, x if z is None else z, z is None)
        if self.mode == "addition" and tasks is not None and self.lora_norm is not None:
            return frozen + self.lora_norm(tasks.sum(0)), tasks
        if self.lora_shared_A is None or self.lora_shared_B is None:
            return frozen, tasks
        low = functional.linear(x, self.lora_shared_A)
        scale = self.shared_scale if self.lora_shared_scale is None else self.lora_shared_scale
        update = functional.linear(low, self.lora_shared_B) * scale
        if self.mode == "matrixv2" and tasks is not None:
            tasks = tasks + update
        return frozen + update, tasks

    def _task_outputs(self, frozen: torch.Tensor, z: torch.Tensor, is_shared: bool) -> Streams:
        if not self.tasks:
            return None
        outputs = []
        trained = getattr(self, "lora_task_scale", {})
        for place, task in enumerate(self.tasks):
            low = functional.linear(z if is_shared else z[place], self.lora_tasks_A[task])
            scale = trained[task] if task in trained else self.task_scales[task]
            outputs.append(frozen + functional.linear(low, self.lora_tasks_B[task]) * scale)
        return torch.stack(outputs)


class StreamLinear(nn.Module):
    """A folded linear layer: scales lie in the updates, and ranks are filled up with zeros.

    ``weight`` serves the tasks' streams; the shared stream adds ``shared_up shared_down``, or has
    its own ``shared_weight`` where that is cheaper. In mode addition there is ``lora_norm``.

    Shape:
        As ``MTLoRALinear`` with x ``[B, L, I]``; ``task_down`` ``[T, 1, I, r]``, ``task_up``
        ``[T, 1, r, O]``, ``shared_down`` ``[I, r]``, ``shared_up`` ``[r, O]``: they multiply from
        the right. No other tensor knows T, so a task leaves a graph with its slices.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    shared_weight: torch.Tensor | None
    shared_down: torch.Tensor | None
    shared_up: torch.Tensor

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for key in ("weight", "bias", "shared_weight", "shared_down", "shared_up"):
            shape = shapes.get(f"{name}.{key}")
            value = None if shape is None else nn.Parameter(torch.zeros(*shape))
            self.register_parameter(key, value)
        self.task_down = nn.Parameter(torch.zeros(*shapes[f"{name}.task_down"]))
        self.task_up = nn.Parameter(torch.zeros(*shapes[f"{name}.task_up"]))
        norm = shapes.get(f"{name}.lora_norm.weight")
        self.lora_norm = None if norm is None else nn.LayerNorm(norm[0])

    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``W x + b``, which all streams share."""
        return functional.linear(x, self.weight, self.bias)

    def tasks(self, frozen: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the tasks' outputs."""
        return frozen + z @ self.task_down @ self.task_up

    def shared(self, x: torch.Tensor, frozen: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Return the shared output; ``total``, the sum of the tasks' outputs, in mode addition."""
        if self.lora_norm is not None:
            result: torch.Tensor = frozen + self.lora_norm(total)
            return result
        if self.shared_weight is not None:
            return functional.linear(x, self.shared_weight, self.bias)
        if self.shared_down is not None:
            return frozen + x @ self.shared_down @ self.shared_up
        return frozen

    def forward(self, x: torch.Tensor, z: Streams = None) -> tuple[torch.Tensor, Streams]:
        """Return the shared output and the tasks'."""
        frozen = self.frozen(x)
        tasks = self.tasks(frozen, x if z is None else z)
        return self.shared(x, frozen, tasks.sum(0) if self.lora_norm else frozen), tasks


def linear(shapes: Shapes, name: str, stage: int, model: SwinModel) -> nn.Module:
    """Return the layer of that name: plain, as trained, or folded."""
    if f"{name}.linear.weight" in shapes:
        return MTLoRALinear(shapes, name, stage, model)
    if f"{name}.task_down" in shapes:
        return StreamLinear(shapes, name)
    outputs, inputs = shapes[f"{name}.weight"]
    return PlainLinear(inputs, outputs, bias=f"{name}.bias" in shapes)
