"""MTLoRA's forward pass on Swin, written from its formulas: for training, and as parity's oracle.

A stage passes one shared stream on. In its last block every task t grows a thin stream beside it:

    y   = W x + b + s B A x                          shared          (mode matrix, matrixv2)
    y_t = W x + b + s_t B_t A_t z_t                  task t          (mode matrix)
    y_t = W x + b + s B A x + s_t B_t A_t z_t        task t          (mode matrixv2)
    y   = W x + b + LN(sum_t y_t)                    shared          (mode addition)

with x the shared input and z_t the task's own: the frozen weight never sees z_t, so y_t is no
linear map of z_t and no merged weight gives it. The scales are not divided by the rank. Streams of
all tasks travel as one tensor ``[T, B, L, C]``.

Modules carry the names of the checkpoint, and layers are chosen by the tensors that are there: a
task term exists if its tensors do. Tensors that ``mtl_export.adapters.mtlora_swin`` has folded
load into the same model.

Source: Agiza, Neseem, Reda, "MTLoRA", CVPR 2024, arXiv:2403.20320, section 3; behaviour where the
paper is silent: https://github.com/scale-lab/MTLoRA/tree/333a375, models/lora.py,
models/swin_transformer_mtlora.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.dense_heads import Decoders, Downsampler, Shapes, resized
from mtl_export.adapters.modules.swin_windows import WindowAttention, attention_mask

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


@dataclass(frozen=True)
class StageFeatures:
    """What a stage gives: ``shared`` ``[B, L, C]``, ``tasks`` ``[T, B, L, C]`` or None."""

    shared: torch.Tensor
    tasks: Streams

    def of(self, place: int) -> torch.Tensor:
        """Return the features of one task: the shared ones, where it has none of its own."""
        return self.shared if self.tasks is None else self.tasks[place]


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
        As ``MTLoRALinear``; ``task_down`` ``[T, r, I]``, ``task_up`` ``[T, O, r]``.
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

    def forward(self, x: torch.Tensor, z: Streams = None) -> tuple[torch.Tensor, Streams]:
        """Return the shared output and the tasks'."""
        frozen = functional.linear(x, self.weight, self.bias)
        z = x.unsqueeze(0) if z is None else z
        count, _, inputs = self.task_down.shape
        low = z.reshape(z.shape[0], -1, inputs) @ self.task_down.transpose(1, 2)
        updates = (low @ self.task_up.transpose(1, 2)).reshape(count, *frozen.shape)
        tasks = frozen + updates
        if self.lora_norm is not None:
            return frozen + self.lora_norm(tasks.sum(0)), tasks
        if self.shared_weight is not None:
            return functional.linear(x, self.shared_weight, self.bias), tasks
        if self.shared_down is not None:
            low = functional.linear(x, self.shared_down)
            return frozen + functional.linear(low, self.shared_up), tasks
        return frozen, tasks


def linear(shapes: Shapes, name: str, stage: int, model: SwinModel) -> nn.Module:
    """Return the layer of that name: plain, as trained, or folded."""
    if f"{name}.linear.weight" in shapes:
        return MTLoRALinear(shapes, name, stage, model)
    if f"{name}.task_down" in shapes:
        return StreamLinear(shapes, name)
    outputs, inputs = shapes[f"{name}.weight"]
    return PlainLinear(inputs, outputs, bias=f"{name}.bias" in shapes)


class Mlp(nn.Module):
    """fc1, GELU (exact), fc2, on both streams."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: torch.Tensor, z: Streams) -> tuple[torch.Tensor, Streams]:
        """Return the shared output and the tasks'."""
        hidden, hidden_tasks = self.fc1(x, z)
        if hidden_tasks is not None:
            hidden_tasks = functional.gelu(hidden_tasks)
        result: tuple[torch.Tensor, Streams] = self.fc2(functional.gelu(hidden), hidden_tasks)
        return result


class Block(nn.Module):
    """Attention and MLP; task streams leave the output projection, or fc2, of the last block."""

    attn_mask: torch.Tensor | None

    def __init__(
        self, shapes: Shapes, name: str, stage: int, resolution: int, model: SwinModel
    ) -> None:
        super().__init__()
        rows, heads = shapes[f"{name}.attn.relative_position_bias_table"]
        window = (int(rows**0.5 + 0.5) + 1) // 2
        is_odd = int(name.rpartition(".")[2]) % 2 == 1
        self.resolution = resolution
        self.shift = window // 2 if is_odd and resolution > window else 0
        width = shapes[f"{name}.norm1.weight"][0]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        qkv, proj, fc1, fc2 = (
            linear(shapes, f"{name}.{layer}", stage, model)
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        self.attn = WindowAttention(qkv, proj, heads=heads, window=window, scale=model.qk_scale)
        self.mlp = Mlp(fc1, fc2)
        mask = attention_mask(resolution, window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Streams]:
        """Return the shared stream ``[B, L, C]`` and the tasks'."""
        mixed = self.attn(self.norm1(x), self.resolution, self.shift, self.attn_mask)
        u, u_tasks = self.attn.proj(mixed)
        u = x + u
        if u_tasks is not None:
            u_tasks = x + u_tasks
        n_tasks = None if u_tasks is None else self.norm2(u_tasks)
        v, v_tasks = self.mlp(self.norm2(u), n_tasks)
        if v_tasks is not None and u_tasks is not None:  # without streams before: no residual
            v_tasks = u_tasks + v_tasks
        return u + v, v_tasks


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, shapes: Shapes, name: str, stage: int, model: SwinModel) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shapes[f"{name}.norm.weight"][0])
        self.reduction = linear(shapes, f"{name}.reduction", stage, model)

    def forward(self, tokens: torch.Tensor, resolution: int) -> torch.Tensor:
        """Return ``[..., L / 4, 2 C]``; neighbours in the order of columns, rows inside."""
        channels, half = tokens.shape[-1], resolution // 2
        grid = tokens.reshape(-1, half, 2, half, 2, channels).permute(0, 1, 3, 4, 2, 5)
        joined = grid.reshape(*tokens.shape[:-2], half * half, 4 * channels)
        result: torch.Tensor = self.reduction(self.norm(joined))[0]
        return result


class Stage(nn.Module):
    """Blocks, then patch merging where there is a next stage."""

    def __init__(self, shapes: Shapes, stage: int, resolution: int, model: SwinModel) -> None:
        super().__init__()
        name = f"backbone.layers.{stage}"
        self.resolution = resolution
        depth = next(i for i in range(1000) if f"{name}.blocks.{i}.norm1.weight" not in shapes)
        self.blocks = nn.ModuleList(
            Block(shapes, f"{name}.blocks.{place}", stage, resolution, model)
            for place in range(depth)
        )
        has_merging = f"{name}.downsample.norm.weight" in shapes
        self.downsample = (
            PatchMerging(shapes, f"{name}.downsample", stage, model) if has_merging else None
        )
        streams = model.streams or model.tasks
        self.chosen = [streams.index(task) for task in model.tasks]

    def forward(self, x: torch.Tensor) -> StageFeatures:
        """Return the features after patch merging."""
        tasks: Streams = None
        for block in self.blocks:
            x, tasks = block(x)
        if tasks is not None and len(self.chosen) < tasks.shape[0]:
            tasks = tasks[self.chosen]
        if self.downsample is None:
            return StageFeatures(x, tasks)
        merged = None if tasks is None else self.downsample(tasks, self.resolution)
        return StageFeatures(self.downsample(x, self.resolution), merged)


class PatchEmbed(nn.Module):
    """Patches of the image as tokens."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        name = "backbone.patch_embed"
        outputs, inputs, patch, _ = shapes[f"{name}.proj.weight"]
        self.proj = nn.Conv2d(inputs, outputs, patch, stride=patch)
        has_norm = f"{name}.norm.weight" in shapes
        self.norm = nn.LayerNorm(outputs) if has_norm else nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return ``[B, L, C]``."""
        result: torch.Tensor = self.norm(self.proj(image).flatten(2).transpose(1, 2))
        return result


class Backbone(nn.Module):
    """Swin with task streams."""

    def __init__(self, shapes: Shapes, model: SwinModel) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shapes)
        position = shapes.get("backbone.absolute_pos_embed")
        self.absolute_pos_embed = None if position is None else nn.Parameter(torch.zeros(*position))
        stages = 1 + max(int(key.split(".")[2]) for key in shapes if ".blocks." in key)
        resolution = model.image_size // shapes["backbone.patch_embed.proj.weight"][2]
        self.layers = nn.ModuleList()
        for stage in range(stages):
            self.layers.append(Stage(shapes, stage, resolution, model))
            resolution //= 2

    def forward(self, image: torch.Tensor) -> list[StageFeatures]:
        """Return what each stage gives."""
        x = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed
        features: list[StageFeatures] = []
        for stage in self.layers:
            features.append(stage(x))
            x = features[-1].shared
        return features


class MTLoRASwin(nn.Module):
    """The whole model: an image in, one map per task out.

    Args:
        shapes: Shape of each tensor by the checkpoint's name: they choose the layers.
        model: What the tensors do not say.

    Shape:
        image ``[B, 3, H, H]``; result by task ``[B, n_t, H, H]``, raw values.
    """

    def __init__(self, shapes: Shapes, model: SwinModel) -> None:
        super().__init__()
        self.model = model
        self.backbone = Backbone(shapes, model)
        self.downsampler = nn.ModuleDict(
            {task: Downsampler(shapes, f"downsampler.{task}") for task in model.tasks}
        )
        self.decoders = Decoders(shapes, model.tasks)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], model: SwinModel) -> MTLoRASwin:
        """Return the model with these values, in evaluation mode.

        Index tables and masks follow from the image's size and are computed, not loaded.

        Raises:
            RuntimeError: A tensor is missing, or one has no place.
        """
        built = cls({name: tuple(value.shape) for name, value in tensors.items()}, model)
        own = {name: value for name, value in built.named_buffers() if name.endswith(COMPUTED)}
        given = {name: v for name, v in tensors.items() if not name.endswith(COMPUTED)}
        built.load_state_dict({**own, **given})
        return built.eval()

    def heads(self, features: Sequence[StageFeatures]) -> dict[str, torch.Tensor]:
        """Return the raw values of each task, at the image's size, from the stages' features."""
        outputs = {}
        for place, task in enumerate(self.model.tasks):
            down = self.downsampler[task]
            maps = [down(stage, one.of(place)) for stage, one in enumerate(features)]
            outputs[task] = resized(self.decoders.decoders[task](maps), self.model.image_size)
        return outputs

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the raw values of each task."""
        return self.heads(self.backbone(image))


COMPUTED = ("relative_position_index", "attn_mask")
