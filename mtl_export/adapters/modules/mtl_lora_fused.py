"""MTL-LoRA on a fused projection, forward pass as its authors' code does it: parity's oracle.

    block c:  h_tc = (W x)_c + s k . sum_i p_tci . B_ci (Lambda_t A x)_c

Symbols and source: ``mtl_export.adapters.mtl_lora_fused``, whose normal form is NOT used here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors

BLOCKS = ("q", "k", "v")


class MTLLoRAFusedLinear(FrozenAdapter):
    """A frozen fused linear layer with MTL-LoRA on some of its blocks.

    Roles and numbers as ``mtl_export.adapters.mtl_lora_fused`` lists them.

    Shape:
        x ``[B, ..., I]``; result ``[B, ..., O]``.
    """

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        self.values = dict(self.named_buffers(recurse=False))
        self.letters = [letter for letter in BLOCKS if f"up_{letter}" in self.values]
        self.rank = self.values[f"up_{self.letters[0]}"].shape[2]
        self.temperature = layer.hyper.get("temperature", float("nan"))

    def scaling_of(self, layer: LayerTensors) -> float:
        """Return s = alpha / r, r of one block."""
        rank = next(t.shape[2] for role, t in layer.tensors.items() if role.startswith("up_"))
        return layer.hyper["alpha"] / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        task_ids = self.routing.rows(x.shape[0])
        z = functional.linear(x, self.values["down"])  # A x
        lambdas = self.values["lambda"][task_ids]
        if lambdas.ndim == 2:
            lambdas = torch.diag_embed(lambdas)
        z = torch.einsum("brd,b...d->b...r", lambdas, z)  # Lambda_t A x, blocks mixed
        scale: float | torch.Tensor = self.scaling
        if "scaler" in self.values:
            scale = scale * torch.sigmoid(self.values["scaler"])
        h: torch.Tensor = self.base(x).clone()
        for position, letter in enumerate(self.letters):
            own = z[..., position * self.rank : (position + 1) * self.rank]
            delta = self._mixed(own, letter, task_ids)
            height = delta.shape[-1]
            start = BLOCKS.index(letter) * height
            h[..., start : start + height] += scale * delta
        return h

    def _mixed(self, z: torch.Tensor, letter: str, task_ids: torch.Tensor) -> torch.Tensor:
        """Return sum_i p_tci B_ci z for one block."""
        ups = self.values[f"up_{letter}"]
        if f"mixing_{letter}" not in self.values:
            return functional.linear(z, ups[0])
        p = torch.softmax(self.values[f"mixing_{letter}"][task_ids] / self.temperature, dim=-1)
        parts = [
            p[:, i].view(-1, *[1] * (z.ndim - 1)) * functional.linear(z, up)
            for i, up in enumerate(ups)
        ]
        return torch.stack(parts).sum(dim=0)
