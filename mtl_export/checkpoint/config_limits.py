"""A ``config.json`` -> nothing, or a refusal: of code from elsewhere, of models without end.

transformers does what a config says: it builds as many layers, and fetches an attention
"kernel", which is a program, from the hub when that has a repository's name. What is said here
is asked before transformers sees the file. ``auto_map`` is harmless: no caller of ours trusts
remote code.

Source: transformers 5.23, ``integrations/hub_kernels.py``, ``is_kernel``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mtl_export.errors import BaseModelError, IntegrityError

# A model without weights in every layer (ALBERT's are shared) has no more layers than this.
MOST_SHARED_LAYERS = 100
MOST_LABELS = 2**20
_LAYERS = re.compile("(.*_)?(n_)?(layers?|blocks?|depths?)")
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")


def check_config(config: Mapping[str, Any], tensors: int, *, where: str) -> None:
    """Refuse a config that asks for more than the weights beside it can be.

    Args:
        config: The content of ``config.json``.
        tensors: How many tensors the weight files hold.
        where: The file, for messages.

    Raises:
        IntegrityError: It asks for a program from the hub.
        BaseModelError: It has more layers than there are tensors, or labels without end.
    """
    most = max(tensors, MOST_SHARED_LAYERS)
    for key, value in _fields(config):
        if key.strip("_").removesuffix("_internal") in _KERNEL_KEYS and "/" in str(value):
            raise IntegrityError(
                f"{where}: {key}: {value!r:.100}, a program on the hub",
                expected="eager, sdpa, or nothing, because code from elsewhere is never run",
                fix="Remove that line, if you trust the rest",
            )
        limit = MOST_LABELS if key == "num_labels" else most if _LAYERS.fullmatch(key) else None
        numbers = value if isinstance(value, list) else [value]
        if limit and any(type(one) is int and one > limit for one in numbers):
            raise BaseModelError(
                f"{where}: {key}: {value!r:.100}",
                expected=(
                    f"at most {limit:,}, with {tensors:,} tensors in the weight files, because the "
                    "model would have weights that are in no file"
                ),
                fix="Use the config.json that was saved with the weights",
            )


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key and value, of configs in the config too."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _fields(value)
