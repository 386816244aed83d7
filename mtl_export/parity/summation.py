"""The same arithmetic in another order: how far a result depends on luck.

    y = sum_i x_i w_i   ->   y = sum_i x_p(i) (1 + e_i) w_p(i)      p a permutation, |e_i| <= u

u is half a unit in the last place. A runtime adds up in an order of its own, and an export
rounds once where the model multiplied twice: both move a result as far as one such change
does. Where large numbers cancel (a norm of a row that is nearly zero), one order may hit the
truth by chance and the next miss it a hundredfold; what a single order says is no floor then.

Source of the idea: Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Half a unit in the last place at 1, and what is wide enough to add it in.
_ROUNDING = {
    torch.float32: (2.0**-24, torch.float64),
    torch.float16: (2.0**-11, torch.float32),
    torch.bfloat16: (2.0**-8, torch.float32),
}
_PRODUCTS = frozenset({
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
})  # fmt: skip
_ADDED_PRODUCTS = frozenset({torch.addmm, torch.baddbmm})


class AnotherOrder(TorchFunctionMode):
    """Within it, PyTorch's matrix products add up in another order, from rounded inputs.

    Everything else is as it was: what adds up elsewhere (norms, softmax) has few terms.

    Args:
        seed: Decides which order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, on permuted operands if it is a product."""
        named = dict(kwargs or {})
        if func is functional.linear:
            x, weight, *others = args
            x, (weight,) = self._reordered(x, [(weight, -1)])
            return func(x, weight, *others, **named)
        if func in _PRODUCTS and min(args[0].ndim, args[1].ndim) > 1:
            x, (weight,) = self._reordered(args[0], [(args[1], -2)])
            return func(x, weight, **named)
        if func in _ADDED_PRODUCTS:
            x, (weight,) = self._reordered(args[1], [(args[2], -2)])
            return func(args[0], x, weight, **named)
        if func is functional.scaled_dot_product_attention:
            query, key, *others = args
            query, (key,) = self._reordered(query, [(key, -1)])
            return func(query, key, *others, **named)
        return func(*args, **named)

    def _reordered(
        self, x: torch.Tensor, others: Sequence[tuple[torch.Tensor, int]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return x with its last axis permuted and rounded, and the others with theirs."""
        order = torch.randperm(x.shape[-1], generator=self._generator)
        moved = [other.index_select(axis % other.ndim, order) for other, axis in others]
        if x.dtype in _ROUNDING:
            half_ulp, wide = _ROUNDING[x.dtype]
            change = torch.rand(x.shape, generator=self._generator).mul_(2).sub_(1).mul_(half_ulp)
            x = (x.to(wide) * (1 + change.to(wide))).to(x.dtype)
        return x.index_select(x.ndim - 1, order), moved
