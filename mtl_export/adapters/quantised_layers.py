"""Refuses an adapter of layers that its base stores quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.quantised import quantised_modules
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import UnusableBaseError, shortened


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


def _dtypes(tensors: Mapping[str, Tensor], stored: Iterable[str]) -> str:
    kinds = {tensors[f"{m}.weight"].dtype for m in stored if f"{m}.weight" in tensors}
    return "weights in " + " and ".join(sorted(kinds)) if kinds else "packed weights"
