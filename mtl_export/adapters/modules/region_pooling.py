"""An image's grid of features, pooled to fewer regions before the encoder reads them.

    p[i, j] = max over the features f[r, c] of one image, a grid of G x G, with
              floor(i G / P) <= r < ceil((i + 1) G / P), and c likewise with j

P x P regions an image stay, P the square root of ``n_boxes``; they keep box and order of the
image's first P x P regions. This is the trainer's ``--downsample`` (adaptive max pooling), which
has no weights. Source: class Downsample of
https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/image_text_understanding/VL-T5/src/modeling_bart.py.

Every row is pooled by itself: its image order and mask say which regions are whose, so rows with
one image and rows with two can share a batch, the shorter one masked. V regions, I images,
N = I P P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mtl_export.errors import UsageError

# A window spans so many regions a side at most, up to grids of 3 P x 3 P.
WINDOW, LARGEST = 4, 3


@dataclass(frozen=True)
class _Images:
    """Where each image of each row lies.

    Attributes:
        total: How many regions it has, int64 ``[B, I]``; 0 where a row has no such image.
        first: The first of them.
        grid: G, the side of their grid.
        is_wrong: Bool ``[B, I]``: there are regions, and they are no grid that is pooled.
    """

    total: torch.Tensor
    first: torch.Tensor
    grid: torch.Tensor
    is_wrong: torch.Tensor


def pooled_regions(
    config: Any,
    vis_feats: torch.Tensor,
    boxes: torch.Tensor,
    img_order_ids: torch.Tensor | None,
    obj_order_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features ``[B, N, F]``, boxes ``[B, N, 4]``, image and region order ``[B, N]``.

    A row with an image that is no square grid of between P and 3 P a side is NaN in a graph.

    Args:
        config: With ``n_boxes`` and ``n_images``.
        vis_feats: ``[B, V, F]``: row by row of the grid, image after image.
        boxes: ``[B, V, 4]``.
        img_order_ids: int64 ``[B, V]``; None: all are of one image, and I is 1.
        obj_order_ids: int64 ``[B, V]``; None for 0 to V - 1.
        mask: ``[B, V]``, 0 for a region that is not there; None: all are.

    Raises:
        UsageError: There is such an image, outside a graph.
    """
    side = math.isqrt(int(config.n_boxes))
    batch, count, width = vis_feats.shape
    numbers = torch.arange(count, device=vis_feats.device)[None].expand(batch, count)
    orders = torch.zeros_like(numbers) if img_order_ids is None else img_order_ids
    numbers = numbers if obj_order_ids is None else obj_order_ids
    images = _images(config, side, orders, mask, is_one=img_order_ids is None)
    # Of one row after the other, so that a plain Gather takes them.
    start = torch.arange(batch, device=vis_feats.device)[:, None] * count
    windows = (start[..., None] + _windows(images, side).clamp(0, count - 1)).flatten()
    most = vis_feats.reshape(batch * count, width).index_select(0, windows)
    most = most.reshape(batch, -1, WINDOW * WINDOW, width).amax(dim=2)
    wrong = images.is_wrong.repeat_interleave(side * side, dim=1)[..., None]
    most = torch.where(wrong, torch.full_like(most, math.nan), most)
    cells = torch.arange(side * side, device=vis_feats.device)
    kept = (images.first[..., None] + cells).flatten(1).clamp(0, count - 1)
    flat = (start + kept).flatten()

    def rest(values: torch.Tensor) -> torch.Tensor:
        rows = values.expand(batch, *values.shape[1:]).flatten(0, 1).index_select(0, flat)
        return rows.reshape(*kept.shape, *values.shape[2:])

    return most, rest(boxes), rest(orders), rest(numbers)


def pooled_mask(
    config: Any, img_order_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return which pooled regions count, int64 ``[B, N]``: those of images that are there.

    Args:
        config: As for ``pooled_regions``, and so are the others.
        img_order_ids: int64 ``[B, V]``, or None.
        mask: ``[B, V]``, or None.

    Returns:
        None if both are None: all count.
    """
    known = img_order_ids if img_order_ids is not None else mask
    if known is None:
        return None
    side = math.isqrt(int(config.n_boxes))
    orders = torch.zeros_like(known) if img_order_ids is None else img_order_ids
    images = _images(config, side, orders, mask, is_one=img_order_ids is None)
    return (images.total > 0).to(torch.int64).repeat_interleave(side * side, dim=1)


def _images(
    config: Any, side: int, orders: torch.Tensor, mask: torch.Tensor | None, *, is_one: bool
) -> _Images:
    device = orders.device
    images = torch.arange(1 if is_one else int(config.n_images), device=device)
    here = orders[:, None] == images[:, None]
    if mask is not None:
        here = here & (mask[:, None] > 0)
    total = here.to(torch.int64).sum(dim=-1)
    places = torch.arange(orders.shape[1], device=device)
    first = torch.where(here, places, orders.shape[1]).amin(dim=-1)
    first = torch.where(total > 0, first, torch.zeros_like(first))
    sides = torch.arange(1, LARGEST * side + 1, device=device)
    # Of whole numbers: a square root may fall short of one.
    grid = (total[..., None] >= sides * sides).to(torch.int64).sum(dim=-1)
    is_wrong = (total > 0) & ((grid < side) | (grid * grid != total))
    if not torch.compiler.is_exporting() and bool(is_wrong.any()):
        least, most = side * side, (LARGEST * side) ** 2
        raise UsageError(
            f"vis_feats: an image of {int(total[is_wrong][0])} regions",
            expected=f"a square number between {least} and {most} for each image (--downsample)",
            fix="Pass the whole grid of features, and masks and image orders that fit it",
        )
    return _Images(total, first, grid, is_wrong)


def _windows(images: _Images, side: int) -> torch.Tensor:
    """Return which regions each pooled one is the maximum of, ``[B, N, WINDOW^2]``.

    A window that is smaller has its last row or column several times.
    """
    cells = torch.arange(side, device=images.grid.device)
    grid = images.grid[..., None]
    start = torch.div(cells * grid, side, rounding_mode="trunc")[..., None]
    end = torch.div((cells + 1) * grid + side - 1, side, rounding_mode="trunc")[..., None]
    steps = torch.arange(WINDOW, device=images.grid.device)
    span = torch.minimum(start + steps, end - 1)  # [B, I, side, WINDOW]
    rows, columns = span[:, :, :, None, :, None], span[:, :, None, :, None, :]
    per_image = images.grid[:, :, None, None, None, None]
    places = images.first[:, :, None, None, None, None] + rows * per_image + columns
    return places.flatten(4).flatten(1, 3)
