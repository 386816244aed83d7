"""One check of what a layer holds: which roles, and shapes that agree with each other.

>>> sizes = {"r": 2}
>>> _fits((2, 5), "r, I", sizes), sizes                # a letter is bound where it first stands
(True, {'r': 2, 'I': 5})
>>> _fits((3, 3), "T, r, r or T, r", sizes), _fits((4,), "n + 1", {"n": 3})
(False, True)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError

RE_SAVE = "Re-save the adapter; all tensors of a layer must come from one training run"


def checked_values(
    layer: LayerTensors,
    required: Mapping[str, str],
    optional: Mapping[str, str] = MappingProxyType({}),
    *,
    fix: str = RE_SAVE,
) -> dict[str, Array]:
    """Return the layer's values by role, float32 or float64, once their shapes fit.

    Args:
        layer: What a checkpoint holds of it.
        required: The shape of each role that must be there, such as ``"T, r, r or T, r"``:
            numbers, and names that mean one size above 0 in all roles; ``n + 1`` is one more.
        optional: The same for roles that may be there.
        fix: What the user does about shapes that do not fit.

    Raises:
        CheckpointError: A tensor is missing or unknown, or the shapes contradict each other.
    """
    found = {role: tensor.shape for role, tensor in layer.tensors.items()}
    known = {**required, **optional}
    sizes: dict[str, int] = {}
    if not required.keys() <= found.keys() <= known.keys() or not all(
        _fits(found[role], wanted, sizes) for role, wanted in known.items() if role in found
    ):
        maybe = f", and maybe {_listed(optional)}" if optional else ""
        raise misshapen(layer, f"{_listed(required)}{maybe}", fix)
    return {role: tensor.widened() for role, tensor in layer.tensors.items()}


def misshapen(layer: LayerTensors, expected: str, fix: str = RE_SAVE) -> CheckpointError:
    """Return the error of a layer whose shapes, all of which it names, are not ``expected``."""
    shapes = sorted((role, list(tensor.shape)) for role, tensor in layer.tensors.items())
    found = ", ".join(f"{role} {shape}" for role, shape in shapes)
    return CheckpointError(f"{layer.module}: {found}", expected=expected, fix=fix)


def _listed(roles: Mapping[str, str]) -> str:
    return ", ".join(
        f"{role} {' or '.join(f'[{one}]' for one in wanted.split(' or '))}"
        for role, wanted in roles.items()
    )


def _fits(shape: tuple[int, ...], wanted: str, sizes: dict[str, int]) -> bool:
    """Return whether ``shape`` is as ``wanted``; names that are new get their size."""
    choices = [one.split(", ") if one else [] for one in wanted.split(" or ")]
    names = next((choice for choice in choices if len(choice) == len(shape)), None)
    if names is None:
        return False
    for size, name in zip(shape, names, strict=True):
        letter, _, more = name.partition(" + ")
        own = size - int(more or 0)
        known = int(letter) if letter.isdecimal() else sizes.setdefault(letter, own)
        if own < 1 or known != own:
            return False
    return True
