"""Tied weights that training pulled apart: each gets a tensor of its own, as it was trained.

    file    model.embed_tokens.weight               which serves as lm_head.weight, too
    trained lm_head.weight, or the embedding alone  the other one stays what it was
    here    model.embed_tokens.weight, lm_head.weight, tie_word_embeddings: false

PEFT wraps one module of several that share a weight; the others keep the base's. Which weights
a class ties is transformers' word, and it is asked only where a name or a size suggests it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.model_class import LM_ENDINGS as GENERATING
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import UnusableBaseError, shortened

if TYPE_CHECKING:
    from mtl_export.adapters.modules.naming import Ties

FLAG = "tie_word_embeddings"
# How the classes of transformers end that have an output layer as large as the vocabulary.
LM_ENDINGS = (*GENERATING, "ForMaskedLM", "ForPreTraining")
# What transformers calls these output layers, and the input embeddings they may be tied to.
OUTPUT_LAYERS = frozenset({
    "lm_head", "embed_out", "decoder", "output_projection", "proj_out", "vocab_projector",
    "generator_lm_head", "lm_loss",
})  # fmt: skip
EMBEDDINGS = frozenset({
    "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings",
})  # fmt: skip
# model_type of classes whose forward pass or config reads the flag for something else, a scale
# of the output in most: it must stay. Weights that differ are not tied all the same.
FLAG_SAYS_MORE = frozenset({
    "t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop", "vilt",
})  # fmt: skip


def untied(adapters: AdapterSet, base: BaseModel, prefix: str) -> tuple[BaseModel, str]:
    """Return the base with every tied weight that the adapter pulls apart, and its prefix.

    Args:
        adapters: Which weights tasks change.
        base: The base model.
        prefix: ``prefix + base tensor name`` is the name in the model class.

    Raises:
        UnusableBaseError: transformers has no such class to ask, or rows were trained of one of
            several tied weights, and another one of them as a whole.
    """
    kind = str(base.config.get("model_type"))
    changed = _changed(adapters)
    if own_class(adapters.model_class) is not None or (
        base.config.get(FLAG) is False and kind not in FLAG_SAYS_MORE
    ):
        return base, prefix
    if not _may_be_tied(changed, adapters, base, prefix):
        return base, prefix
    from mtl_export.adapters.modules.naming import ties_of

    config = base.config if kind in FLAG_SAYS_MORE else _without_flag(base.config)
    stored = {prefix + name: name for name in base.tensors}
    names = {*changed, *adapters.rows, *stored}
    ties = ties_of(adapters.model_class, base.config, config, names)
    if ties is None:
        _refuse_unknown(adapters, base, changed)
        return base, prefix
    tensors = {ties.own[name]: base.tensors[stored[name]] for name in stored}
    called = {ties.own[name]: name for name in [*adapters.rows, *changed]}
    groups = [
        {name: tensors.get(name, tensors[there[0]]) for name in group}
        for group in ties.groups
        if (there := [name for name in group if name in tensors])
    ]
    _refuse_lone_rows(
        adapters, base, ties, {called[n]: g for g in groups for n in g if n in called}
    )
    _refuse_lost_biases(adapters, base, ties, called)
    apart = [group for group in groups if _is_pulled_apart(group, called, adapters)]
    if not apart:
        return base, prefix
    _refuse_rows(adapters, base, [called[n] for group in apart for n in group if n in called])
    apart += [group for group in groups if set(group) & ties.freed]
    by_own = {ties.own[name]: name for name in stored}
    own = {name: tensor for group in apart for name, tensor in group.items()}
    names_of = {name: by_own.get(name, called.get(name, name)) for name in own}
    added = {names_of[name]: own[name] for name in own if name not in by_own}
    named = {name: base.tensors[short] for name, short in stored.items()}
    whole = dataclasses.replace(
        base,
        config=MappingProxyType(dict(config)),
        tensors=MappingProxyType({**named, **added}),
        file_of=MappingProxyType({prefix + name: file for name, file in base.file_of.items()}),
        untied=MappingProxyType(names_of),
    )
    return whole, ""


def _changed(adapters: AdapterSet) -> tuple[str, ...]:
    """Return the names of the tensors that tasks change as a whole."""
    modules = (f"{module}.weight" for module in [*adapters.layers, *adapters.heads])
    return tuple(dict.fromkeys([*modules, *adapters.replaced, *adapters.task_replaced]))


def _may_be_tied(
    changed: Iterable[str], adapters: AdapterSet, base: BaseModel, prefix: str
) -> bool:
    """Return whether transformers is to be asked; a guess, and it decides nothing else."""
    sizes = set(_vocabularies(base.config))
    tables = [
        tensor.shape
        for tensor in base.tensors.values()
        if len(tensor.shape) == 2 and tensor.shape[0] in sizes
    ]
    if len(set(tables)) < len(tables) and adapters.model_class.endswith(LM_ENDINGS):
        return True
    if adapters.rows:
        return True
    for name in changed:
        module = name.rpartition(".")[0]
        tensor = base.tensors.get(name.removeprefix(prefix))
        is_head = module in adapters.heads or not adapters.model_class.endswith(LM_ENDINGS)
        is_absent = tensor is None and (module in adapters.layers or not is_head)
        is_table = tensor is not None and tensor.shape in tables
        if is_absent or is_table or module.rpartition(".")[2] in OUTPUT_LAYERS | EMBEDDINGS:
            return True
    return False


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _vocabularies(value)
        elif "vocab" in name and isinstance(value, int):
            yield value


def _without_flag(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model that ties nothing."""
    inner = {
        name: _without_flag(value)
        for name, value in config.items()
        if isinstance(value, Mapping) and (FLAG in value or name == "text_config")
    }
    return {**config, **inner, FLAG: False}


def _is_pulled_apart(
    group: Mapping[str, Tensor], called: Mapping[str, str], adapters: AdapterSet
) -> bool:
    """Return whether tensors that the class ties are to have different values.

    Args:
        group: The base's, by the class's names.
        called: The adapter's names for those it changes.
        adapters: What changes them.
    """
    first = next(iter(group.values()))
    if any(t is not first and not np.array_equal(t.numpy(), first.numpy()) for t in group.values()):
        return True
    for own in group.keys() & called.keys():
        name = called[own]
        if name.rpartition(".")[0] in {*adapters.layers, *adapters.heads}:
            return True
        values = [adapters.replaced[name]] if name in adapters.replaced else []
        values += [value for value in adapters.task_replaced.get(name, ()) if value is not None]
        if not all(np.array_equal(value, first.widened()) for value in values):
            return True
    return False


def _refuse_lone_rows(
    adapters: AdapterSet, base: BaseModel, ties: Ties, groups: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuse rows that only one of several tied weights has, unless they are the base's.

    Args:
        adapters: With rows.
        base: The base model.
        ties: What its class ties.
        groups: The base's tensors that are tied to it, by the adapter's names.
    """
    for name in adapters.rows.keys() & groups.keys():
        group = groups[name]
        if ties.own[name] in ties.spreading or len(group) == 1:
            continue
        values = group[ties.own[name]].widened()
        trained = [rows for rows in adapters.rows[name] if rows is not None]
        if all(np.array_equal(rows.placed_in(values), values) for rows in trained):
            continue
        others = sorted(group.keys() - {ties.own[name]})
        raise UnusableBaseError(
            f"base {base.reference}: trained rows of {name}, which is tied to {shortened(others)}",
            expected=(
                "rows of the input embedding, in a class that ties its output layer to it: "
                "PEFT gives these rows to that one weight alone"
            ),
            fix=f"Train the ones that are meant of {shortened(sorted(group))} as modules_to_save",
        )


def _refuse_lost_biases(
    adapters: AdapterSet, base: BaseModel, ties: Ties, called: Mapping[str, str]
) -> None:
    """Refuse rows of an embedding that an output layer with a bias is tied to.

    PEFT 0.21 computes that layer without its bias (tuners/trainable_tokens/layer.py).
    """
    for group in ties.groups:
        rows = [called[name] for name in group if called.get(name) in adapters.rows]
        biased = sorted(set(group) & ties.biased)
        if rows and biased:
            raise UnusableBaseError(
                f"base {base.reference}: trained rows of {shortened(rows)}, which is tied to "
                f"{shortened(biased)}",
                expected=(
                    "an output layer without a bias, because PEFT leaves that layer's bias out "
                    "while it trains rows, and no model of transformers can"
                ),
                fix="Train the embedding as modules_to_save",
            )


def _refuse_rows(adapters: AdapterSet, base: BaseModel, names: Iterable[str]) -> None:
    rows = sorted(set(names) & set(adapters.rows))
    if rows:
        raise UnusableBaseError(
            f"base {base.reference}: trained rows of {shortened(rows)}, and a weight that is tied "
            "to it differs",
            expected="rows of one weight, or the whole of another",
            fix="Train all of them as modules_to_save",
        )


def _refuse_unknown(adapters: AdapterSet, base: BaseModel, changed: Iterable[str]) -> None:
    tables = [n for n in changed if n.split(".")[-2] in EMBEDDINGS | OUTPUT_LAYERS]
    if tables:
        raise UnusableBaseError(
            f"base {base.reference}: the adapter changes {shortened(tables)} of the class "
            f"{adapters.model_class!r}, which transformers does not have or cannot build",
            expected=f"a class of transformers, or {FLAG}: false in config.json",
            fix=(
                f"Save the base untied: config.{FLAG} = False and a copy of the embedding as "
                "output layer"
            ),
        )
