"""MTLoRA's forward pass once more, from its formulas: one task at a time, nothing shared, float64.

Written apart from ``mtl_export.adapters.modules``, as the sum over a block's tokens, windows cut
by slicing and every mode a branch, so that the two can disagree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F  # noqa: N812

from tests.dense.checkpoints import (
    DEPTHS,
    SHARED_SCALES,
    TASK_SCALES,
    TASKS,
    Recipe,
)

Values = dict[str, torch.Tensor]


class PlainSwin:
    """The model of a state dict.

    Args:
        state: As stored.
        recipe: What it was made from.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
        self._state = {name: value.double() for name, value in state.items()}
        self._recipe = recipe

    def __call__(self, image: torch.Tensor) -> Values:
        """Return raw values by task for ``[B, 3, H, H]``."""
        s = self._state
        x = F.conv2d(image, s["backbone.patch_embed.proj.weight"],
                     s["backbone.patch_embed.proj.bias"], stride=4)  # fmt: skip
        x = self._norm("backbone.patch_embed.norm", x.permute(0, 2, 3, 1))  # [B, h, h, C]
        maps: dict[str, list[torch.Tensor]] = {task: [] for task in TASKS}
        for stage, depth in enumerate(DEPTHS):
            own: Values = {}
            for block in range(depth):
                x, own = self._block(x, stage, block)
            own = own or dict.fromkeys(TASKS, x)
            if stage < len(DEPTHS) - 1:
                x = self._merge(x, stage)
                own = {task: self._merge(value, stage) for task, value in own.items()}
            for task, value in own.items():
                weight = s[f"downsampler.{task}.downsample_{stage}.weight"]
                maps[task].append(F.conv2d(value.permute(0, 3, 1, 2), weight))
        size = (image.shape[2], image.shape[3])
        return {
            task: F.interpolate(self._head(task, own), size, mode="bilinear")
            for task, own in maps.items()
        }

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self._state[f"{name}.weight"], self._state[f"{name}.bias"]
        )

    def _linear(
        self, name: str, stage: int, x: torch.Tensor, z: Values | None
    ) -> tuple[torch.Tensor, Values]:
        s, mode = self._state, self._recipe.mode
        inner = f"{name}.linear" if f"{name}.linear.weight" in s else name
        frozen = x @ s[f"{inner}.weight"].T
        if f"{inner}.bias" in s:
            frozen = frozen + s[f"{inner}.bias"]
        shared = torch.zeros_like(frozen)
        if f"{name}.lora_shared_A" in s:
            scale = 1.75 if self._recipe.trained_scale else SHARED_SCALES[stage]
            shared = scale * (x @ s[f"{name}.lora_shared_A"].T) @ s[f"{name}.lora_shared_B"].T
        tasks: Values = {}
        for task in TASKS:
            down = s.get(f"{name}.lora_tasks_A.{task}")
            if down is None:
                continue
            own = x if not z else z[task]
            low = own @ down.T @ s[f"{name}.lora_tasks_B.{task}"].T
            tasks[task] = frozen + TASK_SCALES[task][stage] * low
            if mode == "matrixv2":
                tasks[task] = tasks[task] + shared
        if tasks and mode == "addition":
            total = sum(tasks.values(), torch.zeros_like(frozen))
            return frozen + self._norm(f"{name}.lora_norm", total), tasks
        return frozen + shared, tasks

    def _block(self, x: torch.Tensor, stage: int, block: int) -> tuple[torch.Tensor, Values]:
        name = f"backbone.layers.{stage}.blocks.{block}"
        mixed = self._attention(self._norm(f"{name}.norm1", x), name, stage, block)
        u, u_tasks = self._linear(f"{name}.attn.proj", stage, mixed, None)
        u, u_tasks = x + u, {task: x + value for task, value in u_tasks.items()}
        n_tasks = {task: self._norm(f"{name}.norm2", value) for task, value in u_tasks.items()}
        g, g_tasks = self._linear(f"{name}.mlp.fc1", stage, self._norm(f"{name}.norm2", u), n_tasks)
        g, g_tasks = F.gelu(g), {task: F.gelu(value) for task, value in g_tasks.items()}
        v, v_tasks = self._linear(f"{name}.mlp.fc2", stage, g, g_tasks)
        if u_tasks:
            v_tasks = {task: u_tasks[task] + value for task, value in v_tasks.items()}
        return u + v, v_tasks

    def _attention(self, x: torch.Tensor, name: str, stage: int, block: int) -> torch.Tensor:
        side = x.shape[1]
        w = min(self._recipe.window, side)
        shift = w // 2 if block % 2 and side > w else 0
        table = self._state[f"{name}.attn.relative_position_bias_table"]
        heads, width = table.shape[1], x.shape[-1] // table.shape[1]
        x = torch.roll(x, (-shift, -shift), (1, 2))
        result = torch.zeros_like(x)
        zone = [0 if i < side - w else 1 if i < side - shift else 2 for i in range(side)]
        for top in range(0, side, w):
            for left in range(0, side, w):
                cells = [(i, j) for i in range(top, top + w) for j in range(left, left + w)]
                tokens = torch.stack([x[:, i, j] for i, j in cells], 1)  # [B, w*w, C]
                qkv, _ = self._linear(f"{name}.attn.qkv", stage, tokens, None)
                q, k, v = qkv.chunk(3, -1)
                out = []
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
                    for a, (i, j) in enumerate(cells):
                        for b, (k_, l_) in enumerate(cells):
                            row = (i - k_ + w - 1) * (2 * w - 1) + (j - l_ + w - 1)
                            scores[:, a, b] += table[row, head]
                            if shift and (zone[i], zone[j]) != (zone[k_], zone[l_]):
                                scores[:, a, b] -= 100
                    out.append(scores.softmax(-1) @ v[..., part])
                for place, (i, j) in enumerate(cells):
                    result[:, i, j] = torch.cat(out, -1)[:, place]
        return torch.roll(result, (shift, shift), (1, 2))

    def _merge(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        name = f"backbone.layers.{stage}.downsample"
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        joined = self._norm(f"{name}.norm", torch.cat(four, -1))
        return self._linear(f"{name}.reduction", stage, joined, None)[0]

    def _head(self, task: str, maps: list[torch.Tensor]) -> torch.Tensor:
        s, name = self._state, f"decoders.decoders.{task}"
        size = maps[0].shape[2:]
        kind = self._recipe.head

        def conv(at: str, x: torch.Tensor, **given: int) -> torch.Tensor:
            return F.conv2d(x, s[f"{name}.{at}.weight"], s.get(f"{name}.{at}.bias"), **given)

        def norm(at: str, x: torch.Tensor) -> torch.Tensor:
            n = f"{name}.{at}"
            return F.relu(F.batch_norm(x, s[f"{n}.running_mean"], s[f"{n}.running_var"],
                                       s[f"{n}.weight"], s[f"{n}.bias"]))  # fmt: skip

        def large(x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, size, mode="bilinear")

        x = torch.cat([large(one) for one in maps], 1)
        if kind == "hrnet":
            return conv("last_layer.3", norm("last_layer.1", conv("last_layer.0", x)))
        if kind == "aspp":
            found = [norm("0.convs.0.1", conv("0.convs.0.0", x))]
            for place, by in ((1, 12), (2, 24), (3, 36)):
                dilated = conv(f"0.convs.{place}.0", x, padding=by, dilation=by)
                found.append(norm(f"0.convs.{place}.1", dilated))
            pooled = norm("0.convs.4.2", conv("0.convs.4.1", x.mean((2, 3), keepdim=True)))
            found.append(pooled.expand(-1, -1, *size))
            x = norm("0.project.1", conv("0.project.0", torch.cat(found, 1)))
            return conv("4", norm("2", conv("1", x, padding=1)))
        if kind == "segformer":
            found = []
            for place, one in enumerate(maps, start=1):
                linear = f"{name}.linear_c{place}.proj"
                y = one.permute(0, 2, 3, 1) @ s[f"{linear}.weight"].T + s[f"{linear}.bias"]
                found.append(large(y.permute(0, 3, 1, 2)))
            x = torch.cat(found[::-1], 1)
            return conv("linear_pred", norm("linear_fuse.bn", conv("linear_fuse.conv", x)))
        for place in (0, 3, 6):
            weight = s[f"{name}.deconv_layers.{place}.weight"]
            x = norm(f"deconv_layers.{place + 1}", F.conv_transpose2d(x, weight, stride=2))
        x = norm("conv_layers.1", conv("conv_layers.0", x, padding=1))
        for _ in range(2):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return x
