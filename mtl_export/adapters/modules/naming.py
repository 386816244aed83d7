"""Names in files and names in memory: transformers 5 renamed modules and still reads old files.

    vit.encoder.layer.0.attention.attention.query     as every ViT on disk has it
    vit.layers.0.attention.q_proj                     what the class calls it since 5.x

Files and everything built from them keep the stored names; only where a PyTorch model is at
hand are they turned into its own. An adapter trained on such a model may name its modules
either way. The renaming rules are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtl_export.errors import BaseModelError


def own_module(model: Any, stored: str) -> str:
    """Return what ``model`` itself calls the module that files call ``stored``.

    Raises:
        BaseModelError: It has no such module.
    """
    own = _module(own_tensor(model, f"{stored}.weight"))
    for name in (stored, own):
        if _has_module(model, name):
            return name
    raise BaseModelError(
        f"{stored}: {type(model).__name__} has no module of that name",
        expected="a module of the class that was trained",
        fix="Check model_class, or pass the base the adapter was trained on to --base",
    )


def own_tensor(model: Any, stored: str) -> str:
    """Return what ``model`` itself calls the parameter or buffer that files call ``stored``."""
    if _has_module(model, _module(stored)):
        return stored
    return _renamed([stored], model)[stored]


def stored_modules(
    class_name: str, config: Mapping[str, Any], stored: Iterable[str], own: Iterable[str]
) -> dict[str, str]:
    """Return, for module names of a class, the names under which files have them.

    Args:
        class_name: Of transformers.
        config: Of the model with these files.
        stored: Names of the tensors in the files, those of a bare base lacking one part.
        own: Module names as the class has them; those that no tensor fits are left out.
    """
    model = empty_model(class_name, config)
    if model is None:
        return {}
    by_own = {_module(new): _module(old) for old, new in _renamed(stored, model).items()}
    found = {}
    for name in own:
        first, _, rest = name.partition(".")
        if name in by_own:
            found[name] = by_own[name]
        elif rest and rest in by_own:
            found[name] = f"{first}.{by_own[rest]}"
    return {name: stored for name, stored in found.items() if name != stored}


@dataclass(frozen=True)
class Ties:
    """Which weights of a class are one.

    Attributes:
        groups: Names in the class, the one that the others are tied to first.
        freed: Those that are not tied to it any more with another config.
        biased: Weights in ``groups`` of layers that have a bias, too.
        spreading: The weights whose trained rows PEFT gives to all that are tied to them.
        own: The class's names for names in files.
    """

    groups: tuple[tuple[str, ...], ...]
    freed: frozenset[str]
    biased: frozenset[str]
    spreading: frozenset[str]
    own: Mapping[str, str]


def ties_of(
    class_name: str, config: Mapping[str, Any], other: Mapping[str, Any], stored: Iterable[str]
) -> Ties | None:
    """Return what a class of transformers ties, None if there is none to ask.

    Args:
        class_name: Of transformers.
        config: Of the model.
        other: Another config of it.
        stored: Names of tensors in files.
    """
    model, changed = empty_model(class_name, config), empty_model(class_name, other)
    if model is None or changed is None:
        return None
    groups: dict[str, tuple[str, ...]] = {}
    for target, source in sorted(model.all_tied_weights_keys.items()):
        groups[source] = (*groups.get(source, (source,)), target)
    freed = model.all_tied_weights_keys.keys() - changed.all_tied_weights_keys.keys()
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    biased = {n for n in model.all_tied_weights_keys if f"{_module(n)}.bias" in known - {n}}
    return Ties(
        tuple(groups.values()),
        frozenset(freed),
        frozenset(biased),
        frozenset(_spreading(model)),
        _renamed(stored, model),
    )


def _spreading(model: Any) -> set[str]:
    """Return the input embedding's weight, if PEFT gives its rows to all that are tied to it.

    Source: PEFT 0.21.2, utils/other.py, ``set_additional_trainable_modules``.
    """
    ties = getattr(model, "_tied_weights_keys", None)
    if not isinstance(ties, dict) or not getattr(model.config, "tie_word_embeddings", False):
        return set()
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is embedding}


def empty_model(class_name: str, config: Mapping[str, Any]) -> Any:
    """Return the model without memory for its weights; None if it cannot be made."""
    import transformers

    model_class: Any = getattr(transformers, class_name, None)
    try:
        with torch.device("meta"):
            return model_class(model_class.config_class.from_dict(dict(config)))
    except Exception:
        # Whoever needs the model says what is wrong with it; here it is only asked for names.
        return None


def _renamed(stored: Iterable[str], model: Any) -> dict[str, str]:
    """Return the stored names of tensors with ``model``'s own names for them."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return {name: name for name in stored}
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    return {name: rename_source_key(name, rules, [])[0] for name in stored}


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _has_module(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
