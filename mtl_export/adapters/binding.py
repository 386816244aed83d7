"""Hold an adapter against its base: names, shapes and hash, all mismatches at once.

Base folders and checkpoints may name the same layer differently by one prefix:
a bare ``BertModel`` saves ``encoder.layer.0...``, the trained
``BertForSequenceClassification`` says ``bert.encoder.layer.0...``. The names used from
here on are the model class's; ``prefix`` turns a base name into one. Where the checkpoint
names only the kind of model, the base decides the class. The other way round, a base
saved with a head for a class without one, the base's names lose their first part, and what
lies outside it (the head) is left behind.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.lazy import mapped
from mtl_export.adapters.normal_form import AdapterSet, AnyAdapter, Rows
from mtl_export.adapters.quantised_layers import refuse_quantised
from mtl_export.adapters.tying import LM_ENDINGS, untied
from mtl_export.adapters.uncalled import refuse_uncalled
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.hidden_biases import biased_base
from mtl_export.checkpoint.model_class import concrete_class, has_head, is_seq2seq
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.checkpoint.sentence_pipeline import Pipeline, read_pipeline
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import BaseModelError, IntegrityError, shortened


@dataclass(frozen=True)
class BoundModel:
    """An adapter that is known to fit its base.

    Attributes:
        checkpoint: What was read; parity builds its oracle from it.
        adapters: The same in normal form; everything else builds from it.
        base: The base model, without what the model class does not have.
        prefix: ``prefix + base tensor name`` is the name in the model class.
    """

    checkpoint: Checkpoint
    adapters: AdapterSet
    base: BaseModel
    prefix: str

    @property
    def pipeline(self) -> Pipeline | None:
        """Return what makes vectors of the base's hidden states, where tasks answer with these.

        Raises:
            BaseModelError: It is broken, or has what exports do not carry.
        """
        name = self.adapters.model_class
        has_own = has_head(name) or is_seq2seq(name, self.base.config)
        return None if has_own or self.adapters.heads else read_pipeline(self.base.folder)

    def base_tensor(self, name: str) -> Tensor:
        """Return the base tensor that the model class calls ``name``."""
        return self.base.tensors[name.removeprefix(self.prefix)]


def bind(
    checkpoint: Checkpoint, adapters: AdapterSet, base: BaseModel, *, check_hash: bool = True
) -> BoundModel:
    """Return the adapter bound to ``base``.

    Args:
        checkpoint: What was read.
        adapters: The same in normal form.
        base: The base model.
        check_hash: Read the base to check its hash, if the checkpoint names one. Who reads
            all of it anyway may leave that to ``check_base_hash`` afterwards.

    Raises:
        BaseModelError: Layers are missing in the base, have other shapes or are quantised.
        IntegrityError: The checkpoint names the SHA-256 of another base.
    """
    adapters = _settled(adapters, base)
    checkpoint, adapters = _as_stored(checkpoint, adapters, base)
    adapters, base = _whole(checkpoint, adapters, base)
    base = _inside(base, adapters)
    prefix = _prefix(adapters, base)
    refuse_quantised(base, _changed_modules(adapters), prefix)
    base, prefix = untied(adapters, base, prefix)
    base = biased_base(base, prefix, _own_biases(adapters))
    problems = [
        problem
        for layer in adapters.outlines.values()
        if (problem := _mismatch(layer, base, prefix))
    ]
    problems += _misplaced(adapters, base, prefix)
    problems += _altered(checkpoint, base, prefix)
    if problems:
        trained_on = checkpoint.base.sha256
        other = bool(trained_on) and base.sha256 != trained_on
        hashes = f"; SHA-256 {base.sha256}, trained on {trained_on}" if other else ""
        raise BaseModelError(
            f"base {base.reference}: {len(problems)} tensors do not fit: {shortened(problems)}"
            f"{hashes}",
            expected="the base that the adapter was trained on",
            fix=f"Pass that base to --base{_trained_on(checkpoint)}",
        )
    refuse_uncalled(adapters, base)
    bound = BoundModel(checkpoint, adapters, base, prefix)
    bound.pipeline  # noqa: B018 - one that cannot be carried is refused before any work
    if check_hash:
        check_base_hash(bound)
    return bound


def check_base_hash(bound: BoundModel) -> None:
    """Refuse a base other than the one the checkpoint names.

    Raises:
        IntegrityError: The checkpoint names the SHA-256 of another base.
    """
    expected = bound.checkpoint.base.sha256
    if expected and bound.base.sha256 != expected:
        raise IntegrityError(
            f"base {bound.base.reference}: its weights have SHA-256 {bound.base.sha256}",
            expected=expected,
            fix=f"Pass that base to --base{_trained_on(bound.checkpoint)}",
        )


def _settled(adapters: AdapterSet, base: BaseModel) -> AdapterSet:
    """Return ``adapters`` with what only the base can tell: model class and weight layout."""

    def settled(layer: AnyAdapter) -> AnyAdapter:
        is_transposed = is_conv1d(base.config, layer.module)
        return dataclasses.replace(layer, transposed=True) if is_transposed else layer

    return dataclasses.replace(
        adapters,
        model_class=concrete_class(adapters.model_class, base.config),
        layers=mapped(adapters.layers, settled),
    )


def _as_stored(
    checkpoint: Checkpoint, adapters: AdapterSet, base: BaseModel
) -> tuple[Checkpoint, AdapterSet]:
    """Return both with their modules under the names that the base's files have for them.

    transformers 5 renamed modules of some classes (ViT, Swin) and still writes the old names:
    an adapter trained on such a model has names that no file has.
    """
    parts = [name.rpartition(".")[0].split(".") for name in base.tensors]
    known = {".".join(names[start:]) for names in parts for start in range(2)}
    is_known = [name in known or name.partition(".")[2] in known for name in adapters.outlines]
    if all(is_known) or own_class(adapters.model_class) is not None:
        return checkpoint, adapters
    from mtl_export.adapters.modules.naming import stored_modules

    own = [name.rpartition(".")[0] for name in [*adapters.own_tensors, *adapters.replaced]]
    own += [*adapters.outlines, *adapters.heads]
    found = stored_modules(adapters.model_class, base.config, base.tensors, own)
    if not found:
        return checkpoint, adapters
    checkpoint = checkpoint.renamed(found)
    return checkpoint, _settled(read_adapters(checkpoint, base), base)


def _changed_modules(adapters: AdapterSet) -> list[str]:
    tensors = [*adapters.replaced, *adapters.own_tensors]
    return [*adapters.outlines, *(name.rpartition(".")[0] for name in tensors)]


def _own_biases(adapters: AdapterSet) -> list[str]:
    """Return the biases of adapted layers that the checkpoint brings for all tasks."""
    names = (f"{module}.bias" for module in adapters.layers)
    return [name for name in names if name in adapters.replaced]


def _whole(
    checkpoint: Checkpoint, adapters: AdapterSet, base: BaseModel
) -> tuple[AdapterSet, BaseModel]:
    """Return the base that a checkpoint brings itself, where it is a whole model.

    The base given then tells no more than the config; ``replaced`` becomes the base, so that
    adapters are folded into the checkpoint's weights.
    """
    own = own_class(adapters.model_class)
    if own is None:
        return adapters, base
    hyper = next(iter(checkpoint.layers.values())).hyper
    tensors = {
        # Not read in one pass over a file: some tensors of the file are not the model's.
        name: dataclasses.replace(tensor, file=None)
        for name, tensor in sorted(checkpoint.replaced.items())
    }
    carried = BaseModel(
        reference=base.reference,
        folder=base.folder,
        config=MappingProxyType(own.config(base.config, tensors, hyper)),
        tensors=MappingProxyType(tensors),
        weight_files=(checkpoint.path,),
        file_of=MappingProxyType(dict.fromkeys(tensors, 0)),
    )
    carried.__dict__["sha256"] = checkpoint.sha256
    return dataclasses.replace(adapters, replaced=MappingProxyType({})), carried


def _trained_on(checkpoint: Checkpoint) -> str:
    return f" (the checkpoint says {checkpoint.base.id})" if checkpoint.base.id else ""


def _inside(base: BaseModel, adapters: AdapterSet) -> BaseModel:
    """Return the part of ``base`` that has the adapted layers, under its own names."""
    layer = f".{next(iter(adapters.layers))}.weight"
    parts = {name.removesuffix(layer) for name in base.tensors if name.endswith(layer)}
    if layer[1:] in base.tensors or len(parts) != 1:
        return base
    part = f"{parts.pop()}."
    tensors = {
        name.removeprefix(part): tensor
        for name, tensor in base.tensors.items()
        if name.startswith(part)
    }
    files = {
        name.removeprefix(part): file
        for name, file in base.file_of.items()
        if name.startswith(part)
    }
    return dataclasses.replace(
        base, tensors=MappingProxyType(tensors), file_of=MappingProxyType(files)
    )


def _prefix(adapters: AdapterSet, base: BaseModel) -> str:
    """Return the one prefix under which most adapted layers exist in the base."""
    first = next(iter(adapters.layers))
    parts = first.split(".")
    candidates = [""] + [".".join(parts[:i]) + "." for i in range(1, len(parts))]
    return max(
        candidates,
        key=lambda prefix: sum(
            name.startswith(prefix) and f"{name.removeprefix(prefix)}.weight" in base.tensors
            for name in adapters.layers
        ),
    )


def _mismatch(layer: AnyAdapter, base: BaseModel, prefix: str) -> str | None:
    name = f"{layer.module.removeprefix(prefix)}.weight"
    tensor = base.tensors.get(name)
    if tensor is None:
        return f"{name!r} is missing"
    expected = (layer.out_features, layer.in_features)
    expected = expected[::-1] if layer.transposed else expected
    if tensor.shape != expected:
        return f"{name!r} is {list(tensor.shape)}, the adapter needs {list(expected)}"
    return None


def _misplaced(adapters: AdapterSet, base: BaseModel, prefix: str) -> list[str]:
    """Return what is wrong with the tensors that take the place of the base's."""
    shapes = {name: values.shape for name, values in adapters.replaced.items()}
    for name, by_task in adapters.task_replaced.items():
        shapes[name] = next(values.shape for values in by_task if values is not None)
    for layer in adapters.outlines.values():
        if layer.bias is not None:
            shapes[f"{layer.module}.bias"] = (layer.out_features,)
    problems = []
    for name, shape in shapes.items():
        tensor = base.tensors.get(name.removeprefix(prefix))
        if tensor is None and _is_tied_copy(name, adapters, base):
            continue
        if tensor is None:
            problems.append(f"{name!r} is missing, so there is nothing to replace")
        elif tensor.shape != shape:
            problems.append(f"{name!r} is {list(tensor.shape)}, the adapter's is {list(shape)}")
    for name, rows in _own_rows(adapters):
        tensor = base.tensors.get(name.removeprefix(prefix))
        if tensor is None:
            problems.append(f"{name!r} is missing, so it has no rows to replace")
        elif tensor.shape[1:] != rows.values.shape[1:] or rows.indices.max() >= tensor.shape[0]:
            problems.append(
                f"{name!r} is {list(tensor.shape)}, the adapter has rows up to"
                f" {rows.indices.max()} of {list(rows.values.shape[1:])}"
            )
    return problems


def _is_tied_copy(name: str, adapters: AdapterSet, base: BaseModel) -> bool:
    """Return whether ``name`` is an output layer that the base ties to its embedding.

    Some trainers save it with the adapter all the same; it replaces nothing then.
    """
    copies = [values for values in adapters.task_replaced.get(name, ()) if values is not None]
    copies += [adapters.replaced[name]] if name in adapters.replaced else []
    return (
        bool(copies)
        and adapters.model_class.endswith(LM_ENDINGS)
        and any(
            all(np.array_equal(tensor.widened(), values) for values in copies)
            for key, tensor in base.tensors.items()
            if "embed" in key and tensor.shape == copies[0].shape
        )
    )


def _own_rows(adapters: AdapterSet) -> list[tuple[str, Rows]]:
    return [
        (name, rows)
        for name, by_task in adapters.rows.items()
        for rows in by_task
        if rows is not None
    ]


def _altered(checkpoint: Checkpoint, base: BaseModel, prefix: str) -> list[str]:
    """Return which of the base's tensors the checkpoint remembers differently."""
    problems = []
    for member in [checkpoint, *checkpoint.members]:
        for name, copy in member.base_copies.items():
            tensor = base.tensors.get(name.removeprefix(prefix))
            if tensor is None or tensor.shape != copy.shape:
                found = "missing" if tensor is None else str(list(tensor.shape))
                problems.append(f"{name!r} is {found}, the checkpoint's copy {list(copy.shape)}")
            elif not np.array_equal(tensor.widened(), copy.widened()):
                problems.append(f"{name!r} has other values than the checkpoint's copy of it")
    return problems
