"""The base layer behind an adapter, for families whose normal form depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.errors import BaseModelError


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """One linear layer of the base, read when asked for.

    Attributes:
        module: Its dotted name in the model class.
        base: The base model; None when the checkpoint is read without one.
    """

    module: str
    base: BaseModel | None

    def weight(self) -> Array:
        """Return the weight, ``[O, I]``.

        Raises:
            BaseModelError: There is no base, or it has no such layer.
        """
        tensor = self._tensor("weight")
        if tensor is None:
            raise BaseModelError(
                where=f"{self.module}.weight",
                found="the base model was not given or has no such tensor",
                expected="the base the adapter was trained on",
                why="this adapter's weights depend on it",
                fix="Pass it to --base",
            )
        return tensor.widened()

    def bias(self) -> Array | None:
        """Return the bias, ``[O]``, or None if the layer has none.

        Raises:
            BaseModelError: As for ``weight``: without a base nobody can tell.
        """
        if self.base is None:
            self.weight()
        tensor = self._tensor("bias")
        return None if tensor is None else tensor.widened()

    def _tensor(self, kind: str) -> Tensor | None:
        """Return the layer's tensor, under whatever prefix the base lacks."""
        if self.base is None:
            return None
        parts = f"{self.module}.{kind}".split(".")
        names = (".".join(parts[start:]) for start in range(len(parts) - 1))
        return next((self.base.tensors[name] for name in names if name in self.base.tensors), None)
