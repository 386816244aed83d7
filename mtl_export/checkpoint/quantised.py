"""Which layers of a base are stored quantised: their numbers are codes, to which nothing is added.

    weight F8_E4M3, weight_scale | weight_scale_inv       compressed-tensors, fine-grained fp8
    weight I8, SCB | weight U8, weight.absmax             bitsandbytes, 8 and 4 bits
    qweight, qzeros, scales | weight_packed | ...         GPTQ, AWQ; compressed-tensors' integers

Full-precision weights whose config.json still has a ``quantization_config`` are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor

# How the tensors are called that stand beside a quantised weight, or in its place.
CODES = frozenset({
    "weight_scale", "weight_scale_inv", "weight_packed", "SCB", "absmax", "quant_map", "qweight",
    "qzeros", "W_q", "_data", "_packed",
})  # fmt: skip


def without_leftover(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ``config`` without quantisation settings that no weight has."""
    if "quantization_config" in config and not quantised_modules(tensors):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def quantised_modules(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the modules whose weights are codes."""
    found = set()
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in CODES or (kind == "weight" and tensor.dtype not in FLOAT_DTYPES):
            found.add(module.removesuffix(".weight"))
    return frozenset(found)
