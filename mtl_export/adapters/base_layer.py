"""The base layer behind an adapter, for families whose normal form depends on it.

A linear layer is ``y = x W^T + b`` with W ``[O, I]``. Two kinds of module store W
transposed: transformers' ``Conv1D`` (GPT-2) and every embedding, which is a linear layer
of one-hot inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtl_export.adapters.quantised_layers import refuse_quantised
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Array, Tensor
from mtl_export.errors import BaseModelError

# Model types whose layers of these names are transformers' Conv1D. Found by searching
# transformers 5.23 (src/transformers/models) for Conv1D; the shape alone cannot tell, for
# GPT-2's attn.c_proj is square, and PEFT's fan_in_fan_out is one flag for all layers.
CONV1D_MODEL_TYPES = frozenset({
    "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt",
})  # fmt: skip
CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Return whether ``module`` of a model with this ``config.json`` is a Conv1D."""
    name = module.rpartition(".")[2]
    return config.get("model_type") in CONV1D_MODEL_TYPES and name in CONV1D_LAYERS


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """One linear layer of the base, read when asked for.

    Attributes:
        module: Its dotted name in the model class.
        base: The base model; None when the checkpoint is read without one.
        embedding: It is an embedding.
    """

    module: str
    base: BaseModel | None
    embedding: bool = False

    @property
    def stored_transposed(self) -> bool:
        """Whether the base stores the weight ``[I, O]``."""
        return self.embedding or (
            self.base is not None and is_conv1d(self.base.config, self.module)
        )

    def weight(self) -> Array:
        """Return the weight, ``[O, I]``.

        Raises:
            BaseModelError: There is no base, or it has no such layer.
        """
        tensor = self._tensor("weight")
        if self.base is not None and (tensor is None or tensor.dtype not in FLOAT_DTYPES):
            refuse_quantised(self.base, [self.module])
        if tensor is None:
            is_given = self.base is not None
            missing = "the base has no such tensor" if is_given else "no base model was given"
            raise BaseModelError(
                f"{self.module}.weight: {missing}",
                expected="the base the adapter was trained on, which its weights depend on",
                fix="Pass it to --base"
                + ", saved untied if it is tied: config.tie_word_embeddings = False and a copy of"
                " the embedding as output layer" * is_given,
            )
        values = tensor.widened()
        return values.T if self.stored_transposed else values

    def shape(self) -> tuple[int, ...]:
        """Return the weight's shape, ``[O, I]``; the weight is not read.

        Raises:
            BaseModelError: As for ``weight``.
        """
        tensor = self._tensor("weight")
        stored: tuple[int, ...] = self.weight().shape if tensor is None else tensor.shape
        return stored[::-1] if self.stored_transposed else stored

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
        """Return the layer's tensor, under whatever prefix the base lacks or adds."""
        if self.base is None:
            return None
        full = f"{self.module}.{kind}"
        parts = full.split(".")
        names = [".".join(parts[start:]) for start in range(len(parts) - 1)]
        names += [name for name in self.base.tensors if name.endswith(f".{full}")]
        return next((self.base.tensors[name] for name in names if name in self.base.tensors), None)
