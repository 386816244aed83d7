"""Which layers a model of transformers calls, told by running it, else by its source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.naming import empty_model, own_module
from mtl_export.errors import BaseModelError


def uncalled(class_name: str, config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return those of ``modules`` whose weight the model reads without calling them.

    Args:
        class_name: Of transformers.
        config: Of the model.
        modules: Their names; those that the class does not have are left out.
    """
    with quiet_transformers():
        model = empty_model(class_name, config)
    if model is None:
        return []
    found: list[str] = []
    unclear: dict[str, str] = {}
    for name in modules:
        try:
            own = own_module(model, name)
        except BaseModelError:
            continue  # binding says what is missing
        parent_name, _, attribute = own.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.MultiheadAttention):
            found.append(name)
        elif (reads := _reads(type(parent), attribute)) and _calls(type(parent), attribute):
            unclear[name] = own
        elif reads:
            found.append(name)
    return found + (_left_out(model, unclear) if unclear else [])


def _sources(parent: type) -> str:
    """Return the source of a class and its parents, without what draws first weights."""
    own = [one for one in parent.__mro__ if one.__module__.startswith("transformers.models")]
    text = "\n".join(inspect.getsource(one) for one in own)
    return "\n".join(line for line in text.splitlines() if "init." not in line)


def _reads(parent: type, attribute: str) -> bool:
    pattern = rf"self\.{attribute}\.weight\b(?!\.(?:dtype|device|shape|ndim|size|new_|is_))"
    return re.search(pattern, _sources(parent)) is not None


def _calls(parent: type, attribute: str) -> bool:
    return re.search(rf"self\.{attribute}\(", _sources(parent)) is not None


def _left_out(model: Any, modules: Mapping[str, str]) -> list[str]:
    """Return those of ``modules`` that their parents do without in a run on a few tokens.

    Where the run ends early, what was seen of one layer holds for all of its kind. A model that
    takes other inputs tells nothing: then there are none.

    Args:
        model: Without memory for its weights.
        modules: Names, with the model's own.
    """
    seen: dict[tuple[type, str], set[str]] = {}
    kinds = {}
    for name, own in modules.items():
        parent_name, _, attribute = own.rpartition(".")
        parent = model.get_submodule(parent_name)
        kinds[name] = seen_of = (type(parent), attribute)
        parent.register_forward_hook(lambda *_, k=seen_of: seen.setdefault(k, set()).add("parent"))
        layer = model.get_submodule(own)
        layer.register_forward_hook(lambda *_, k=seen_of: seen.setdefault(k, set()).add("layer"))
    # Anything may happen without numbers; whoever needs the model's answers runs it with.
    with suppress(Exception), torch.device("meta"), torch.no_grad(), quiet_transformers():
        model.set_attn_implementation("eager")
        tokens = torch.ones(1, 3, dtype=torch.int64)
        model.eval()(input_ids=tokens, attention_mask=tokens, use_cache=False)
    return [name for name, kind in kinds.items() if seen.get(kind) == {"parent"}]
