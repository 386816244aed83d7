"""Shifted-window attention of Swin Transformer, as MTLoRA uses it.

Tokens of an ``h x h`` map lie row by row, ``[..., h * h, C]``. Attention looks at windows of
``w x w`` tokens; every second block first rolls the map by ``w // 2`` and masks pairs of tokens
that only the roll made neighbours. Index table and mask follow from h and w alone.

Source: Liu et al., "Swin Transformer", ICCV 2021, section 3.2 and equation 4; the order of rows in
``qkv`` (q, k, v, each by head) and the value -100 of the mask as in
https://github.com/scale-lab/MTLoRA/tree/333a375, models/swin_transformer_mtlora.py.
"""

from __future__ import annotations

import torch
from torch import nn

MASKED = -100.0


def relative_position_index(window: int) -> torch.Tensor:
    """Return ``[w*w, w*w]`` int64: the row of the bias table for each pair of tokens."""
    axis = torch.arange(window)
    rows, columns = axis.repeat_interleave(window), axis.repeat(window)
    down = rows[:, None] - rows[None, :] + window - 1
    across = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + across


def attention_mask(resolution: int, window: int, shift: int) -> torch.Tensor:
    """Return ``[windows, w*w, w*w]`` float32: 0, or -100 between tokens of different regions."""
    axis = torch.arange(resolution)
    band = (axis >= resolution - window).long() + (axis >= resolution - shift).long()
    regions = (band[:, None] * 3 + band[None, :]).reshape(1, -1, 1)
    regions = to_windows(regions, resolution, window).squeeze(-1)
    differ = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(differ.shape).masked_fill(differ, MASKED)


def to_windows(tokens: torch.Tensor, resolution: int, window: int) -> torch.Tensor:
    """Return ``[B * windows, w*w, C]`` for tokens ``[B, h*h, C]``."""
    count, channels = resolution // window, tokens.shape[-1]
    grid = tokens.reshape(-1, count, window, count, window, channels)
    return grid.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(windows: torch.Tensor, resolution: int, window: int) -> torch.Tensor:
    """Return tokens ``[B, h*h, C]`` for ``[B * windows, w*w, C]``.

    Only the batch is inferred. Where the batch is computed by a division, an exporter that traces
    a dynamic batch takes the traced number for a constant.
    """
    count, channels = resolution // window, windows.shape[-1]
    grid = windows.reshape(-1, count, count, window, window, channels)
    return grid.transpose(2, 3).reshape(-1, resolution * resolution, channels)


class WindowAttention(nn.Module):
    """Attention inside windows, up to the output projection, which the block applies.

    Args:
        qkv: The layer ``[C] -> [3 C]``; it returns a pair whose first entry counts.
        proj: The output projection, held here because checkpoints name it so.
        heads: Number of heads; it divides C.
        resolution: h, the side of the map; a multiple of ``window``.
        window: w.
        shift: 0, or w // 2.
        scale: Factor of q; None for 1 / sqrt(C / heads).

    Shape:
        ``[B, h*h, C]`` in and out.
    """

    relative_position_index: torch.Tensor
    attn_bias: torch.Tensor | None

    def __init__(
        self, qkv: nn.Module, proj: nn.Module, *, heads: int, window: int, scale: float | None
    ) -> None:
        super().__init__()
        self.qkv, self.proj = qkv, proj
        self.heads, self.window, self.scale = heads, window, scale
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.register_buffer("attn_bias", None, persistent=False)

    def bias(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Return what is added to the scores: ``[1 or windows, heads, w*w, w*w]``."""
        tokens = self.window**2
        rows = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = rows.view(tokens, tokens, self.heads).permute(2, 0, 1).unsqueeze(0)
        return bias if mask is None else bias + mask.unsqueeze(1)

    def forward(
        self, tokens: torch.Tensor, resolution: int, shift: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the mixed values of every token, before the output projection."""
        channels = tokens.shape[-1]
        width = channels // self.heads
        if shift:
            tokens = _rolled(tokens, resolution, -shift)
        windows = to_windows(tokens, resolution, self.window)
        size = self.window**2
        qkv = self.qkv(windows)[0].view(-1, size, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scale = width**-0.5 if self.scale is None else self.scale
        scores = (q if scale == 1 else q * scale) @ k.transpose(-2, -1)
        bias = self.bias(mask) if self.attn_bias is None else self.attn_bias
        if len(bias) > 1:  # one per window of an image
            scores = scores.view(-1, len(bias), self.heads, size, size)
            scores = (scores + bias).view(-1, self.heads, size, size)
        else:
            scores = scores + bias
        mixed = scores.softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(-1, size, channels)
        tokens = from_windows(mixed, resolution, self.window)
        return _rolled(tokens, resolution, shift) if shift else tokens


def _rolled(tokens: torch.Tensor, resolution: int, by: int) -> torch.Tensor:
    """Return the tokens of the map rolled by ``by`` rows and columns."""
    channels = tokens.shape[-1]
    grid = tokens.reshape(-1, resolution, resolution, channels)
    rolled = torch.roll(grid, shifts=(by, by), dims=(1, 2))
    return rolled.reshape(-1, resolution * resolution, channels)
