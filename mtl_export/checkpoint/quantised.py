"""Which layers of a base are stored quantised: their numbers are codes, to which nothing is added.

    weight F8_E4M3, weight_scale | weight_scale_inv       compressed-tensors, fine-grained fp8
    weight I8, SCB | weight U8, weight.absmax             bitsandbytes, 8 and 4 bits
    qweight, qzeros, scales | weight_packed | ...         GPTQ, AWQ; compressed-tensors' integers

Full-precision weights whose config.json still has a ``quantization_config`` are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor
from mtl_export.errors import UnusableBaseError, shortened

if TYPE_CHECKING:
    from mtl_export.checkpoint.base_model import BaseModel

# How the tensors are called that stand beside a quantised weight, or in its place.
CODES = frozenset({
    "weight_scale", "weight_scale_inv", "weight_packed", "SCB", "absmax", "quant_map", "qweight",
    "qzeros", "W_q", "_data", "_packed",
})  # fmt: skip


def refuse_quantised(base: BaseModel, modules: Iterable[str], prefix: str = "") -> None:
    """Refuse an adapter of quantised layers.

    Args:
        base: The base model.
        modules: What the adapter changes, under the model class's names.
        prefix: ``prefix + base tensor name`` is the name in the model class.

    Raises:
        UnusableBaseError: One of ``modules`` is stored quantised.
    """
    stored = quantised_modules(base.tensors)
    found = [module for module in modules if module.removeprefix(prefix) in stored]
    if not found:
        return
    settings = base.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    raise UnusableBaseError(
        f"base {base.reference}: it is quantised ({_dtypes(base.tensors, stored)}, quant_method "
        f"{str(method or 'unknown')!r}), in the adapted {shortened(found)} too",
        expected=(
            "weights in F32, F16 or BF16, because the delta cannot be added to a weight's "
            "quantised codes"
        ),
        fix=(
            "Pass the model that it was quantised from to --base, or save a dequantised copy: "
            "AutoModel….from_pretrained(…, dtype=torch.bfloat16).dequantize() and save_pretrained"
        ),
    )


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


def _dtypes(tensors: Mapping[str, Tensor], stored: Iterable[str]) -> str:
    kinds = {tensors[f"{m}.weight"].dtype for m in stored if f"{m}.weight" in tensors}
    return "weights in " + " and ".join(sorted(kinds)) if kinds else "packed weights"
