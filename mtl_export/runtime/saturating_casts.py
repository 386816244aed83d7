"""Casts that keep what is finite finite: for a float64 model whose layers compute in float32.

A mask says "never" by the least value of the model's own dtype. Layers that take their softmax
in float32 turn float64's into -inf; a row that is padding before its first token is then -inf
all through, its softmax 0 / 0, and the NaN reaches every row of the next layer. In float32, in
which the model was trained, the least value stays finite and such a row is an average.

    x float64, dtype float32   ->   x clamped to float32's range, cast; infinities stay
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NAMED = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}
_LIKE_ANOTHER = frozenset({torch.Tensor.to, torch.Tensor.type_as})


class SaturatingCasts(TorchFunctionMode):
    """Within it, a finite float64 number stays finite in whatever dtype it is cast to."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, on an operand within the range of the dtype it asks for."""
        named = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            target = _asked_for(func, (*args[1:], *named.values()))
            if target is not None and target.is_floating_point and target is not torch.float64:
                most, x = torch.finfo(target).max, args[0]
                args = (torch.where(x.isinf(), x, x.clamp(-most, most)), *args[1:])
        return func(*args, **named)


def _asked_for(func: Callable[..., Any], arguments: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype that a call names, None if it keeps its operand's."""
    if func in _NAMED:
        return _NAMED[func]
    for one in arguments:
        if isinstance(one, torch.dtype):
            return one
        if func in _LIKE_ANOTHER and isinstance(one, torch.Tensor):
            return one.dtype
    return None
