"""Adapted layers that the model never calls: it reads their weight, so no adapter was trained.

    x = self.dt_proj(x)                     an adapter in its place is called
    x = self.dt_proj.weight @ x             Mamba: it is not, and its delta stays what it was drawn
    nn.MultiheadAttention                   reads the weight of its out_proj

Which class reads what is looked up in transformers' own sources, as text; only where they read
the weight of a layer of an adapted one's name is the model built, and without memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtl_export.adapters.normal_form import AdapterSet, AnyAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.errors import UnusableBaseError, shortened

# A weight that is read for its numbers, and lines that do something else with its name.
_READ = re.compile(
    r"\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim|size|new_|requires_grad|is_))"
)
_ELSE = re.compile(r"\binit\.|_init|\.data\b|isinstance|\"[\w.]+\.weight\"")


def refuse_uncalled(adapters: AdapterSet, base: BaseModel) -> None:
    """Refuse adapters of layers that the model class never calls.

    Raises:
        UnusableBaseError: There are some.
    """
    if own_class(adapters.model_class) is not None:
        return
    read = set().union(*(_read_in(kind) for kind in _model_types(base.config)))
    suspects = [name for name in adapters.outlines if name.rpartition(".")[2] in read]
    if not suspects:
        return
    from mtl_export.adapters.modules.calls import uncalled

    found = uncalled(adapters.model_class, base.config, suspects)
    found = [name for name in found if _changes(adapters.layers[name])]
    if found:
        raise UnusableBaseError(
            f"base {base.reference}: {adapters.model_class} never calls the adapted "
            f"{shortened(found)}: it reads their weight",
            expected="adapters of layers that the model calls: these were never trained",
            fix=(
                "Remove these layers from the adapter (from its tensors and its target_modules), "
                "or train it without them"
            ),
        )


def _changes(layer: AnyAdapter) -> bool:
    """Return whether a layer has more than the zeros that PEFT starts from, and that stay."""
    tasks = range(layer.task_count)
    return layer.gain is not None or any(layer.delta(task).any() for task in tasks)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the model types of a config and of those in it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _model_types(value)
        elif name == "model_type":
            yield str(value).replace("-", "_")


@cache
def _read_in(model_type: str) -> frozenset[str]:
    """Return the names of layers whose weight the sources of ``model_type`` read."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    models = Path(spec.origin).parent / "models"
    # siglip_vision_model lies in siglip.
    folders = [path for path in models.iterdir() if model_type.startswith(path.name)]
    folder = max(folders, key=lambda path: len(path.name), default=None)
    found: set[str] = set()
    for file in folder.glob("modeling_*.py") if folder else ():
        text = file.read_text(encoding="utf-8")
        lines = (line for line in text.splitlines() if ".weight" in line)
        found |= {name for line in lines if not _ELSE.search(line) for name in _READ.findall(line)}
        found |= {"out_proj"} if "nn.MultiheadAttention(" in text else set()
    return frozenset(found)
