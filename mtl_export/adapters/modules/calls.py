"""Which layers a model of transformers does not call, told by the source of what holds them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.naming import empty_model, own_module
from mtl_export.errors import BaseModelError

# transformers calls Mamba's dt_proj for bases that it quantised itself, and these are refused.
_QUANTISED = re.compile(r"if hasattr\(self\.config, \"_is_quantized\"\):\n.*\n")


def uncalled(class_name: str, config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return those of ``modules`` whose weight the model reads without calling them.

    Args:
        class_name: Of transformers.
        config: Of the model.
        modules: Their names; those that the class does not have are left out.
    """
    with quiet_transformers():
        model = empty_model(class_name, config)
    found = []
    for name in modules if model is not None else ():
        try:
            parent_name, _, attribute = own_module(model, name).rpartition(".")
        except BaseModelError:
            continue  # binding says what is missing
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.MultiheadAttention) or _only_reads(type(parent), attribute):
            found.append(name)
    return found


def _only_reads(parent: type, attribute: str) -> bool:
    """Return whether a class reads the weight of its layer ``attribute`` and never calls it."""
    own = [one for one in parent.__mro__ if one.__module__.startswith("transformers.models")]
    text = _QUANTISED.sub("", "\n".join(inspect.getsource(one) for one in own))
    text = "\n".join(line for line in text.splitlines() if "init." not in line)
    reads = rf"self\.{attribute}\.weight\b(?!\.(?:dtype|device|shape|ndim|size|new_|is_))"
    calls = rf"self\.{attribute}\("
    return re.search(reads, text) is not None and re.search(calls, text) is None
