"""MTL-LoRA on a fused projection: one down-projection, up-projections of each block's own.

    rows of block c:   h_tc = (W x)_c + s k . sum_i p_tci . B_ci (Lambda_t A x)_c
    other rows:        h_t  = W x                              p_tc = softmax(w_tc / tau)

The g adapted blocks (q, k, v, in this order) of a fused linear layer share A [g r, I] and
Lambda_t [g r, g r] or its diagonal; (.)_c takes the r rows of the c-th adapted block, so a
full Lambda mixes the blocks before they part. B_ci [h, r] with h = O / blocks; a block
without mixing weights has one B for all tasks. s = alpha / r, k = sigmoid(scaler) or 1.

Source: https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/src/adapter/mlora.py, class
mLoRAMergedLinear. The paper: see ``mtl_lora``.

| there                | role here               | shape                   |
|----------------------|-------------------------|-------------------------|
| lora_A               | down                    | [g r, I]                |
| lora_lambdas         | lambda                  | [T, g r, g r], [T, g r] |
| lora_B_{q,k,v}       | up_q, up_k, up_v        | [n, h, r], or [1, h, r] |
| lora_B_{q,k,v}_w     | mixing_q, mixing_k, ... | [T, n], or absent       |
| lora_scaler          | scaler                  | []                      |

How many blocks the fused layer has is read off the base: O / h. Without a base the
layer is taken to have as many as its letters need.

Normal form: down = A; up has B_ci in the rows of block c and the columns of (c, i);
core_t has s k p_tci (Lambda_t)_c in the rows of (c, i).
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.mtl_lora import hyper_parameter, learnt_scale, softmax
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values, misshapen
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError

NAME = "mtl_lora_fused"
# Position of each projection in the fused layer.
BLOCKS = {"q": 0, "k": 1, "v": 2}


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one fused layer; the base only says how many blocks it has.

    Raises:
        HyperparameterError: ``alpha`` or ``temperature`` is unknown, or tau <= 0.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
    """
    values = _checked_values(layer)
    letters = [letter for letter in BLOCKS if f"up_{letter}" in values]
    _, head, rank = values[f"up_{letters[0]}"].shape
    scale = hyper_parameter(layer, "alpha") / rank * learnt_scale(values)
    lambdas = values["lambda"].astype(np.float64)
    if lambdas.ndim == 2:
        lambdas = lambdas[:, :, None] * np.eye(lambdas.shape[1])
    cores, ups = [], []
    block_count = block_count_of(layer, base, head, letters)
    for position, letter in enumerate(letters):
        rows = lambdas[:, position * rank : (position + 1) * rank]
        weights = _weights(layer, values, letter, len(lambdas))
        cores.append(scale * weights[:, :, None, None] * rows[:, None])
        for up in values[f"up_{letter}"]:
            placed = np.zeros((head * block_count, rank), up.dtype)
            placed[BLOCKS[letter] * head : (BLOCKS[letter] + 1) * head] = up
            ups.append(placed)
    stacked = np.concatenate(cores, axis=1)
    return LayerAdapter(
        module=layer.module,
        down=values["down"],
        core=stacked.reshape(len(lambdas), -1, lambdas.shape[2]),
        up=np.concatenate(ups, axis=1),
    )


def block_count_of(layer: LayerTensors, base: BaseLayer, head: int, letters: list[str]) -> int:
    """Return how many blocks of ``head`` rows the base layer has.

    Raises:
        CheckpointError: The base layer is no whole number of blocks, or has too few.
    """
    needed = BLOCKS[letters[-1]] + 1
    if base.base is None:
        return needed
    out_features = base.shape()[0]
    if out_features % head or out_features // head < needed:
        raise CheckpointError(
            f"{layer.module}: blocks of {head} rows for {', '.join(letters)}, base layer of "
            f"{out_features}",
            expected=f"a multiple of {head}, at least {needed * head}",
            fix="Pass the base that the adapter was trained on to --base",
        )
    return int(out_features // head)


def _weights(layer: LayerTensors, values: dict[str, Array], letter: str, tasks: int) -> Array:
    """Return p_tc: float64 ``[T, n]``."""
    if f"mixing_{letter}" not in values:
        return np.ones((tasks, 1))
    temperature = hyper_parameter(layer, "temperature")
    return softmax(values[f"mixing_{letter}"].astype(np.float64) / temperature)


def _checked_values(layer: LayerTensors) -> dict[str, Array]:
    """Return the values by role, once every shape fits."""
    letters = [letter for letter in BLOCKS if f"up_{letter}" in layer.tensors]
    ups = {f"up_{letter}": f"n_{letter}, h, r" for letter in letters or BLOCKS}
    mixings = {f"mixing_{letter}": f"T, n_{letter}" for letter in letters}
    required = {"down": "g r, I", "lambda": "T, g r, g r or T, g r", **ups}
    values = checked_values(layer, required, {**mixings, "scaler": ""})
    for letter in letters:
        if f"mixing_{letter}" not in values and len(values[f"up_{letter}"]) > 1:
            raise misshapen(layer, f"mixing_{letter} [T, n], or up [1, h, r] alone")
    rank = values[f"up_{letters[0]}"].shape[2]
    if values["down"].shape[0] != len(letters) * rank:
        raise misshapen(layer, f"down [g r, I], g r = {len(letters)} * {rank}")
    return values
