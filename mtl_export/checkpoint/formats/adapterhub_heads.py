"""AdapterHub's heads: which transformers class computes the same, and where its layers go.

A flexible head is a chain of linear layers with one function between them,
``heads.<name>.<i>.weight`` and ``.bias``, applied to the first token's hidden state (in
language models: the last token's that is not padding), to the pooler's output, or for
tagging to every token. Where a transformers class computes just that, the head becomes
its: a two-layer tanh head on BERT is BertForSequenceClassification with the first layer as
its pooler. Where none does, the layers become a ``Readout``.

A static head is the saving class's own (``classifier``, ``score``, ``lm_head``), one for all
tasks, and every task's folder has a copy.

Where the heads of several tasks are not one computation with different numbers, each becomes
a readout of the bare model with an output of its own (``checkpoint.outputs``); other kinds of
heads (question answering, multiple choice) are refused.

Source: heads/base.py, heads/model_mixin.py and models/*/adapter_model.py of adapters 1.3.0,
https://github.com/adapter-hub/adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.checkpoint import (
    HeadTensors,
    LedgerEntry,
    Pooling,
    Readout,
    TaskKind,
)
from mtl_export.checkpoint.formats.adapterhub_files import StoredAdapter
from mtl_export.checkpoint.outputs import BARE, named_outputs
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import AdapterError, CheckpointError, shortened

FLEXIBLE_CLASSES = ("AdapterModel", "ModelWithHeads")
HEADED_CLASSES = ("ForSequenceClassification", "ForTokenClassification")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
# Where a flexible classification head of each model type reads.
POOLINGS_OF: Mapping[str, Pooling] = MappingProxyType({
    **dict.fromkeys(
        ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "roberta",
         "xlm-roberta", "xmod"), "first",
    ),
    **dict.fromkeys(("gpt2", "gptj", "llama", "mistral"), "last"),
})  # fmt: skip
_DENSE_OUT = ("classifier.dense", "classifier.out_proj")
# (model type, pooling, functions) -> class and modules that compute the same. Poolers of BERT
# and heads of RoBERTa use tanh, heads of DistilBERT relu and of ELECTRA gelu, whatever the config.
STOCK_HEADS: Mapping[tuple[str, Pooling, tuple[str, ...]], tuple[str, tuple[str, ...]]] = {
    ("bert", "pooler", ()): ("BertForSequenceClassification", ("classifier",)),
    ("bert", "first", ("tanh",)): (
        "BertForSequenceClassification", ("bert.pooler.dense", "classifier"),
    ),
    ("bert", "tokens", ()): ("BertForTokenClassification", ("classifier",)),
    ("roberta", "first", ("tanh",)): ("RobertaForSequenceClassification", _DENSE_OUT),
    ("roberta", "tokens", ()): ("RobertaForTokenClassification", ("classifier",)),
    ("xlm-roberta", "first", ("tanh",)): ("XLMRobertaForSequenceClassification", _DENSE_OUT),
    ("xlm-roberta", "tokens", ()): ("XLMRobertaForTokenClassification", ("classifier",)),
    ("distilbert", "first", ("relu",)): (
        "DistilBertForSequenceClassification", ("pre_classifier", "classifier"),
    ),
    ("distilbert", "tokens", ()): ("DistilBertForTokenClassification", ("classifier",)),
    ("electra", "first", ("gelu",)): ("ElectraForSequenceClassification", _DENSE_OUT),
    ("electra", "tokens", ()): ("ElectraForTokenClassification", ("classifier",)),
}  # fmt: skip
# AdapterHub's word for a function, where transformers has another.
FUNCTIONS = {"leakyrelu": "leaky_relu", "": "linear"}


@dataclass(frozen=True)
class TaskHead:
    """One task's head, placed in a model class.

    Attributes:
        model_class: transformers class whose module names are used.
        readout: Set where that class has no such head.
        flexible: What it computes on the bare model, where it is no class's own; its layers are
            ``heads``, in order.
        heads: By module.
        replaced: A language model's own head, by its name in the class.
        labels: In logit order.
        kind: Of the task.
        strips_base: Whether the class is the bare base, whose names lack their first part.
        ledger: What becomes of each tensor of the head's file.
    """

    model_class: str
    readout: Readout | None = None
    flexible: Readout | None = None
    heads: Mapping[str, HeadTensors] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: TaskKind = "headless"
    strips_base: bool = False
    ledger: tuple[LedgerEntry, ...] = ()

    @property
    def computation(self) -> tuple[str, Readout | None, tuple[str, ...]]:
        """Return what all tasks of one graph must have in common."""
        return self.model_class, self.readout, tuple(self.heads)


def read_head(stored: StoredAdapter) -> TaskHead:
    """Return the head saved with one adapter.

    Raises:
        AdapterError: It is of a kind that is not supported.
        CheckpointError: It is missing where the class needs one, or its tensors do not fit.
    """
    model_class = stored.model_class
    if model_class.endswith(FLEXIBLE_CLASSES):
        return _flexible(stored)
    if model_class.endswith(HEADED_CLASSES):
        return _static(stored)
    if model_class.endswith(LANGUAGE_MODELS):
        return TaskHead(
            model_class,
            replaced=MappingProxyType(dict(stored.head_tensors)),
            ledger=tuple(
                LedgerEntry(stored.ledger_prefix + key, "copied", "the language model's own head")
                for key in stored.head_tensors
            ),
        )
    if stored.head_tensors:
        raise _refused(stored, f"the head of {model_class}")
    return TaskHead(model_class)


def joined_heads(stored: list[StoredAdapter], heads: list[TaskHead]) -> list[TaskHead]:
    """Return the heads in one model class.

    Raises:
        CheckpointError: They differ, and some are a class's own.
    """
    if len({head.computation for head in heads}) == 1:
        return heads
    flexible = [head.flexible for head in heads if head.flexible is not None]
    if len(flexible) < len(heads):
        kinds_of_heads = "; ".join(
            f"{entry.task}: {_described(head)}" for entry, head in zip(stored, heads, strict=True)
        )
        raise CheckpointError(
            f"{stored[0].where}: the tasks' heads differ in what they compute: {kinds_of_heads}",
            expected="one kind of head for all tasks, flexible heads, or no heads",
            fix="Export these tasks separately: point --checkpoint at one task's folder",
        )
    kinds = [head.kind for head in heads]
    named = named_outputs(list(zip(flexible, kinds, strict=True)))
    return [
        replace(
            head,
            model_class=_bare(entry.model_class),
            readout=readout,
            heads=MappingProxyType(dict(zip(readout.modules, head.heads.values(), strict=True))),
            strips_base=True,
        )
        for entry, head, readout in zip(stored, heads, named, strict=True)
    ]


def _bare(model_class: str) -> str:
    """Return the class without a head of a class with flexible ones."""
    return re.sub(r"AdapterModel$|ModelWithHeads$", "Model", model_class)


def _described(head: TaskHead) -> str:
    if not head.heads:
        return f"{head.model_class} without a head"
    if head.readout is None:
        return f"{head.model_class} ({' and '.join(head.heads)})"
    functions = ", ".join(head.readout.activations) or "no function"
    return f"{len(head.heads)} layers on {head.readout.pooling} ({functions})"


def _flexible(stored: StoredAdapter) -> TaskHead:
    bare = _bare(stored.model_class)
    dead = tuple(
        LedgerEntry(stored.ledger_prefix + key, "known-dead", "another task's head, saved along")
        for key in stored.head_tensors
        if not key.startswith(f"heads.{stored.name}.")
    )
    config = (stored.head_config or {}).get("config")
    own = {
        key: tensor
        for key, tensor in stored.head_tensors.items()
        if key.startswith(f"heads.{stored.name}.")
    }
    if not isinstance(config, dict) or not own:
        return TaskHead(bare, flexible=BARE, strips_base=True, ledger=dead)
    readout, kind = _readout(stored, config)
    layers = _chain(stored, config, own)
    stock = STOCK_HEADS.get((stored.facts["model_type"], readout.pooling, readout.activations))
    model_class, modules = stock or (bare, readout.modules)
    return TaskHead(
        model_class=model_class,
        readout=None if stock else readout,
        flexible=readout,
        heads=MappingProxyType(dict(zip(modules, layers, strict=True))),
        labels=_labels(stored, config.get("label2id"), layers[-1]),
        kind=kind,
        strips_base=stock is None,
        ledger=(
            *(LedgerEntry(stored.ledger_prefix + key, "head") for key in own),
            *dead,
        ),
    )


def _readout(stored: StoredAdapter, config: Mapping[str, Any]) -> tuple[Readout, TaskKind]:
    """Return what a flexible head computes, and the kind of its task."""
    head_type, layers = config.get("head_type"), config.get("layers")
    if head_type not in {"classification", "multilabel_classification", "tagging"}:
        raise _refused(stored, f"a head of type {head_type!r}")
    pooling = POOLINGS_OF.get(stored.facts["model_type"])
    if pooling is None:
        raise _refused(stored, f"a head on model type {stored.facts['model_type']!r}")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise _broken(stored, f"layers is {layers!r}", "a number of layers")
    function = str(config.get("activation_function") or "").lower()
    kind: TaskKind = "single_label_classification"
    if head_type == "tagging":
        pooling = "tokens"
    elif config.get("use_pooler"):
        pooling = "pooler"
    if head_type == "multilabel_classification":
        kind = "multi_label_classification"
    elif head_type == "classification" and config.get("num_labels") == 1:
        kind = "regression"
    return Readout(pooling, (FUNCTIONS.get(function, function),) * (layers - 1)), kind


def _chain(
    stored: StoredAdapter, config: Mapping[str, Any], own: Mapping[str, Tensor]
) -> list[HeadTensors]:
    """Return the linear layers of a flexible head, in order.

    Raises:
        CheckpointError: There are more or fewer than the config says, or they do not fit.
    """
    prefix = f"heads.{stored.name}."
    numbers = sorted(
        {int(m[1]) for key in own if (m := re.fullmatch(r"(\d+)\.weight", key[len(prefix) :]))}
    )
    known = {f"{prefix}{n}.{kind}" for n in numbers for kind in ("weight", "bias")}
    unknown = sorted(own.keys() - known)
    layers = [
        HeadTensors(own[f"{prefix}{n}.weight"], own.get(f"{prefix}{n}.bias")) for n in numbers
    ]
    shapes = [layer.weight.shape for layer in layers]
    chained = all(len(shape) == 2 for shape in shapes) and all(
        before[0] == after[1] for before, after in pairwise(shapes)
    )
    biased = all(
        layer.bias is None or layer.bias.shape == layer.weight.shape[:1] for layer in layers
    )
    if unknown or not chained or not biased or len(layers) != config["layers"]:
        raise _broken(
            stored,
            f"unknown {shortened(map(repr, unknown))}" if unknown else f"weights {shapes}",
            f"{config['layers']} linear layers, each as wide as the one before it",
        )
    return layers


def _static(stored: StoredAdapter) -> TaskHead:
    tensors = dict(stored.head_tensors)
    modules = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    known = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    flat = [key for key in tensors if key.endswith(".weight") and len(tensors[key].shape) != 2]
    unknown = sorted([*(tensors.keys() - known), *flat])
    if not modules or unknown:
        raise _broken(
            stored,
            f"unknown {shortened(map(repr, unknown))}" if unknown else "no head was saved",
            f"the linear layers of {stored.model_class}'s head",
        )
    heads = {
        module: HeadTensors(tensors[f"{module}.weight"], tensors.get(f"{module}.bias"))
        for module in modules
    }
    config = stored.head_config or {}
    labels = _labels(stored, config.get("label2id"), heads[modules[-1]])
    is_regression = len(labels) == 1 and "ForSequence" in stored.model_class
    return TaskHead(
        stored.model_class,
        heads=MappingProxyType(heads),
        labels=labels,
        kind="regression" if is_regression else "single_label_classification",
        ledger=tuple(LedgerEntry(stored.ledger_prefix + key, "head") for key in tensors),
    )


def _labels(stored: StoredAdapter, label2id: object, last: HeadTensors) -> tuple[str, ...]:
    """Return the label names in logit order, invented where the head has none.

    Raises:
        CheckpointError: There are more or fewer names than logits.
    """
    count = last.weight.shape[0]
    if not isinstance(label2id, dict) or not label2id:
        return tuple(f"LABEL_{index}" for index in range(count))
    if sorted(map(str, label2id.values())) != sorted(map(str, range(count))):
        raise _broken(
            stored,
            f"label2id numbers {len(label2id)} labels",
            f"one name for each of {count} logits",
        )
    return tuple(str(name) for name, _ in sorted(label2id.items(), key=lambda item: int(item[1])))


def _refused(stored: StoredAdapter, found: str) -> AdapterError:
    return AdapterError(
        f"{stored.where}: head of {stored.task!r}: {found} is not supported",
        expected=(
            "classification, multi-label classification, regression or tagging on "
            f"{', '.join(POOLINGS_OF)}, because where other heads read from, and what they answer, "
            "is not known here"
        ),
        fix="Save the adapter without its head (with_head=False) and apply the head yourself",
    )


def _broken(stored: StoredAdapter, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{stored.where}: head of {stored.task!r}: {found}",
        expected=f"{expected}, because the head was saved by {stored.model_class}",
        fix="Save the adapter again together with its head",
    )
