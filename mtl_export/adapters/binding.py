"""Hold an adapter against its base: names, shapes and hash, all mismatches at once.

Base folders and checkpoints may name the same layer differently by one prefix:
a bare ``BertModel`` saves ``encoder.layer.0...``, the trained
``BertForSequenceClassification`` says ``bert.encoder.layer.0...``. The names used from
here on are the model class's; ``prefix`` turns a base name into one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtl_export.adapters.normal_form import AdapterSet, AnyAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import BaseModelError, IntegrityError, shortened


@dataclass(frozen=True)
class BoundModel:
    """An adapter that is known to fit its base.

    Attributes:
        checkpoint: What was read; parity builds its oracle from it.
        adapters: The same in normal form; everything else builds from it.
        base: The base model.
        prefix: ``prefix + base tensor name`` is the name in the model class.
    """

    checkpoint: Checkpoint
    adapters: AdapterSet
    base: BaseModel
    prefix: str

    def base_tensor(self, name: str) -> Tensor:
        """Return the base tensor that the model class calls ``name``."""
        return self.base.tensors[name.removeprefix(self.prefix)]


def bind(checkpoint: Checkpoint, adapters: AdapterSet, base: BaseModel) -> BoundModel:
    """Return the adapter bound to ``base``.

    Raises:
        BaseModelError: Layers are missing in the base or have other shapes.
        IntegrityError: The checkpoint names the SHA-256 of another base.
    """
    prefix = _prefix(adapters, base)
    problems = [
        problem for layer in adapters.layers.values() if (problem := _mismatch(layer, base, prefix))
    ]
    problems += _misplaced(adapters, base, prefix)
    if problems:
        raise BaseModelError(
            where=f"base {base.reference}",
            found=f"{len(problems)} tensors do not fit: {shortened(problems)}",
            expected="the base that the adapter was trained on",
            why="the delta is added to the base weight, element by element",
            fix=f"Pass that base to --base{_trained_on(checkpoint)}",
        )
    expected = checkpoint.base.sha256
    if expected and base.sha256 != expected:
        raise IntegrityError(
            where=f"base {base.reference}",
            found=f"its weights have SHA-256 {base.sha256}",
            expected=expected,
            why="the checkpoint was trained on that very base",
            fix=f"Pass that base to --base{_trained_on(checkpoint)}",
        )
    return BoundModel(checkpoint, adapters, base, prefix)


def _trained_on(checkpoint: Checkpoint) -> str:
    return f" (the checkpoint says {checkpoint.base.id})" if checkpoint.base.id else ""


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
    if tensor.shape != expected:
        return f"{name!r} is {list(tensor.shape)}, the adapter needs {list(expected)}"
    return None


def _misplaced(adapters: AdapterSet, base: BaseModel, prefix: str) -> list[str]:
    """Return what is wrong with the tensors that take the place of the base's."""
    shapes = {name: values.shape for name, values in adapters.replaced.items()}
    for name, by_task in adapters.task_replaced.items():
        shapes[name] = next(values.shape for values in by_task if values is not None)
    for layer in adapters.layers.values():
        if layer.bias is not None:
            shapes[f"{layer.module}.bias"] = (layer.out_features,)
    problems = []
    for name, shape in shapes.items():
        tensor = base.tensors.get(name.removeprefix(prefix))
        if tensor is None:
            problems.append(f"{name!r} is missing, so there is nothing to replace")
        elif tensor.shape != shape:
            problems.append(f"{name!r} is {list(tensor.shape)}, the adapter's is {list(shape)}")
    return problems
