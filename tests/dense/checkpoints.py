"""MTLoRA files as its trainer writes them, small and whole, in every mode.

Ranks and scales differ by task and stage, so that a mixed-up one shows; nothing is zero, so that a
missing term shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mtl_export.adapters.modules.swin_windows import attention_mask, relative_position_index
from tests.checkpoint.mtlora_toys import write

TASKS = ("semseg", "normals", "sal")
CHANNELS = {"semseg": 5, "normals": 3, "sal": 1, "depth": 1}
DEPTHS, HEADS, EMBED, WINDOW, SIZE = (2, 1, 2, 2), (1, 2, 2, 4), 8, 4, 64
SHARED_SCALES = [1.0, 0.5, 0.75, 1.25]
TASK_SCALES = {
    "semseg": [0.5, 0.75, 1.0, 1.25],
    "normals": [0.75, 1.0, 1.25, 0.5],
    "sal": [1.0, 1.25, 0.5, 0.75],
}
RANKS = {"semseg": [3, 2, 1, 1], "normals": [2, 1, 1, 3], "sal": [1, 1, 3, 2]}
SHARED_RANKS = (3, 4, 5, 6)
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Recipe:
    """What a toy is like.

    Attributes:
        mode: SHARED_MODE of its configuration.
        merging: MTLoRA+: patch merging is adapted, too.
        trained_scale: The shared scale was trained.
        adapted: Which layers of a block are adapted.
        head: Kind of every head.
        image_size: In pixels.
        window: In tokens.
        settings: Changes of MODEL.MTLORA.
        depths: Blocks of each stage.
        heads: Heads of attention, by stage.
        embed: Width of the first stage.
        widths: Channels of the maps that heads read, by stage.
        channels: Output channels by task.
        shared_ranks: r by stage.
        rank: r_t everywhere; 0 for ranks that differ by task and stage.
    """

    mode: str = "matrix"
    merging: bool = False
    trained_scale: bool = False
    adapted: tuple[str, ...] = LAYERS
    head: str = "hrnet"
    image_size: int = SIZE
    window: int = WINDOW
    settings: Mapping[str, Any] = field(default_factory=dict)
    depths: tuple[int, ...] = DEPTHS
    heads: tuple[int, ...] = HEADS
    embed: int = EMBED
    widths: tuple[int, ...] = (3, 4, 5, 6)
    channels: Mapping[str, int] = field(default_factory=lambda: {t: CHANNELS[t] for t in TASKS})
    shared_ranks: tuple[int, ...] = SHARED_RANKS
    rank: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks in id order."""
        return tuple(self.channels)

    def rank_of(self, task: str, stage: int) -> int:
        """Return r_t: ``rank``, or the toy's own."""
        return self.rank or RANKS[task][stage]


PLAIN = Recipe()


class _Draw:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(7)

    def weight(self, name: str, *shape: int) -> None:
        """Add a tensor whose rows have length 1."""
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
        self.tensors[name] = torch.randn(shape, generator=self._generator) / fan_in**0.5

    def norm(self, name: str, width: int) -> None:
        """Add a layer normalisation."""
        self.weight(f"{name}.bias", width)
        self.tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=self._generator)

    def batch_norm(self, name: str, width: int) -> None:
        """Add a batch normalisation with its statistics."""
        self.norm(name, width)
        self.weight(f"{name}.running_mean", width)
        self.tensors[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=self._generator)
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)


def state(recipe: Recipe = PLAIN) -> dict[str, torch.Tensor]:
    """Return a whole state dict."""
    draw = _Draw()
    draw.weight("backbone.patch_embed.proj.weight", recipe.embed, 3, 4, 4)
    draw.weight("backbone.patch_embed.proj.bias", recipe.embed)
    draw.norm("backbone.patch_embed.norm", recipe.embed)
    resolution = recipe.image_size // 4
    for stage, depth in enumerate(recipe.depths):
        for block in range(depth):
            _block(draw, recipe, stage, block, resolution)
        width = recipe.embed * 2**stage
        if stage < len(recipe.depths) - 1:
            name = f"backbone.layers.{stage}.downsample"
            draw.norm(f"{name}.norm", 4 * width)
            _linear(draw, recipe, f"{name}.reduction", stage, (2 * width, 4 * width),
                    is_adapted=recipe.merging, has_bias=False)  # fmt: skip
            resolution //= 2
    for task in recipe.tasks:
        _head(draw, recipe, task)
    return draw.tensors


def _block(draw: _Draw, recipe: Recipe, stage: int, block: int, resolution: int) -> None:
    width, name = recipe.embed * 2**stage, f"backbone.layers.{stage}.blocks.{block}"
    window = min(recipe.window, resolution)
    draw.norm(f"{name}.norm1", width)
    draw.norm(f"{name}.norm2", width)
    table = f"{name}.attn.relative_position_bias_table"
    draw.weight(table, (2 * window - 1) ** 2, recipe.heads[stage])
    draw.tensors[f"{name}.attn.relative_position_index"] = relative_position_index(window)
    if block % 2 and resolution > window:
        draw.tensors[f"{name}.attn_mask"] = attention_mask(resolution, window, window // 2)
    shapes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for layer, shape in shapes.items():
        has_tasks = layer != "attn.qkv" and block == recipe.depths[stage] - 1
        _linear(draw, recipe, f"{name}.{layer}", stage, shape,
                is_adapted=layer in recipe.adapted, has_tasks=has_tasks)  # fmt: skip


def _linear(
    draw: _Draw, recipe: Recipe, name: str, stage: int, shape: tuple[int, int],
    *, is_adapted: bool, has_tasks: bool = False, has_bias: bool = True,
) -> None:  # fmt: skip
    outputs, inputs = shape
    inner = f"{name}.linear" if is_adapted else name
    draw.weight(f"{inner}.weight", outputs, inputs)
    if has_bias:
        draw.weight(f"{inner}.bias", outputs)
    if not is_adapted:
        return
    has_tasks = has_tasks and recipe.mode != "lora_only"
    if has_tasks and recipe.mode == "addition":
        draw.norm(f"{name}.lora_norm", outputs)
    else:
        draw.weight(f"{name}.lora_shared_A", recipe.shared_ranks[stage], inputs)
        draw.weight(f"{name}.lora_shared_B", outputs, recipe.shared_ranks[stage])
    if recipe.trained_scale:
        draw.tensors[f"{name}.lora_shared_scale"] = torch.tensor([1.75])
    for task in sorted(recipe.tasks) if has_tasks else ():  # sorted, as the trainer stores them
        draw.weight(f"{name}.lora_tasks_A.{task}", recipe.rank_of(task, stage), inputs)
        draw.weight(f"{name}.lora_tasks_B.{task}", outputs, recipe.rank_of(task, stage))


def _head(draw: _Draw, recipe: Recipe, task: str) -> None:
    widths = recipe.widths
    features = [
        recipe.embed * 2 ** min(stage + 1, len(recipe.depths) - 1)
        for stage in range(len(recipe.depths))
    ]
    for stage, (width, channels) in enumerate(zip(widths, features, strict=True)):
        draw.weight(f"downsampler.{task}.downsample_{stage}.weight", width, channels, 1, 1)
    name, total, count = f"decoders.decoders.{task}", sum(widths), recipe.channels[task]
    if recipe.head == "hrnet":
        draw.weight(f"{name}.last_layer.0.weight", 4 * total, total, 1, 1)
        draw.weight(f"{name}.last_layer.0.bias", 4 * total)
        draw.batch_norm(f"{name}.last_layer.1", 4 * total)
        draw.weight(f"{name}.last_layer.3.weight", count, 4 * total, 1, 1)
        draw.weight(f"{name}.last_layer.3.bias", count)
    elif recipe.head == "aspp":
        _aspp(draw, name, total, count)
    elif recipe.head == "segformer":
        for place, width in enumerate(widths, start=1):
            draw.weight(f"{name}.linear_c{place}.proj.weight", 6, width)
            draw.weight(f"{name}.linear_c{place}.proj.bias", 6)
        draw.weight(f"{name}.linear_fuse.conv.weight", 6, 24, 1, 1)
        draw.batch_norm(f"{name}.linear_fuse.bn", 6)
        for layer in ("linear_pred", "conv_seg"):
            draw.weight(f"{name}.{layer}.weight", count, 6, 1, 1)
            draw.weight(f"{name}.{layer}.bias", count)
    else:
        for place, inputs in ((0, total), (3, 4), (6, 4)):
            draw.weight(f"{name}.deconv_layers.{place}.weight", inputs, 4, 2, 2)
            draw.batch_norm(f"{name}.deconv_layers.{place + 1}", 4)
        draw.weight(f"{name}.conv_layers.0.weight", count, 4, 3, 3)
        draw.weight(f"{name}.conv_layers.0.bias", count)
        draw.batch_norm(f"{name}.conv_layers.1", count)


def _aspp(draw: _Draw, name: str, total: int, count: int) -> None:
    for branch, (place, kernel) in enumerate([(0, 1), (0, 3), (0, 3), (0, 3), (1, 1)]):
        layer = f"{name}.0.convs.{branch}"
        draw.weight(f"{layer}.{place}.weight", 6, total, kernel, kernel)
        draw.batch_norm(f"{layer}.{place + 1}", 6)
    draw.weight(f"{name}.0.project.0.weight", 6, 30, 1, 1)
    draw.batch_norm(f"{name}.0.project.1", 6)
    draw.weight(f"{name}.1.weight", 6, 6, 3, 3)
    draw.batch_norm(f"{name}.2", 6)
    draw.weight(f"{name}.4.weight", count, 6, 1, 1)
    draw.weight(f"{name}.4.bias", count)


def configuration(recipe: Recipe = PLAIN) -> dict[str, Any]:
    """Return the configuration that belongs to it, as the trainer stores it."""
    listed = [
        {task: TASK_SCALES.get(task, SHARED_SCALES)[stage] for task in recipe.tasks}
        for stage in range(len(recipe.depths))
    ]
    lora = {
        "SHARED_MODE": recipe.mode,
        "SPLIT_QKV": False,
        "TRAINABLE_SCALE_SHARED": recipe.trained_scale,
        "SHARED_SCALE": SHARED_SCALES,
        "TASK_SCALE": [9.0] * len(recipe.depths),
        "SCALE_PER_TASK_LIST": listed,
    }
    return {
        "TASKS": list(recipe.tasks),
        "DATA": {"IMG_SIZE": recipe.image_size},
        "MODEL": {
            "MTLORA": lora | dict(recipe.settings),
            "DECODER_HEAD": dict.fromkeys(recipe.tasks, recipe.head),
            "SWIN": {"WINDOW_SIZE": recipe.window, "QK_SCALE": None},
        },
    }


def checkpoint_file(folder: Path, recipe: Recipe = PLAIN) -> Path:
    """Write a toy to ``ckpt_epoch_3.pth`` in ``folder``; return the file."""
    folder.mkdir(exist_ok=True)
    return write(folder / "ckpt_epoch_3.pth", state(recipe), configuration(recipe))
