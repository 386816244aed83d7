"""One AdapterHub adapter's tensors, by module and role.

    <module>.loras.<name>.lora_A                 (r, I)             down
    <module>.loras.<name>.lora_B                 (O, r)             up
                                                 (n, O, r)          up, MTL-LoRA
                                                 (O, 1)             scale, (IA)^3
    <module>.loras.<name>.task_specific.values   (r)                lambda, one task's diagonal
    <module>.loras.<name>.weights                (n)                mixing, one task's
    <module>.loras.<name>.m.weight               (O, 1)             magnitude, DoRA

All methods call themselves "lora" or "mtl_lora"; other fields of the config tell them apart.
The softmax temperature is "weights_sharpness", and s = alpha / r throughout ((IA)^3: alpha).

Not read, each refused with its reason: gates, VeRA and DVoRA, a full MTL-LoRA Lambda (no
released version can train one), fused query-key-value layers, and everything that is not
a change of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.checkpoint import LayerTensors, LedgerEntry
from mtl_export.checkpoint.formats.adapterhub_files import StoredAdapter
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.errors import AdapterError, CheckpointError, shortened

# The first release in which alpha counted; before, s was 1.
# https://github.com/adapter-hub/adapters/pull/770, and loading.py's _fix_backward_compat.
FIRST_WITH_ALPHA = (1, 1, 0)
_TIED = ".shared_parameters."


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    Attributes:
        family: Name in ``adapters.family.FAMILIES``.
        roles: File suffix to role.
        vectors: Suffixes stored as one column.
    """

    family: str
    roles: Mapping[str, str]
    vectors: frozenset[str] = frozenset()


MTL_LORA = Method(
    "mtl_lora",
    MappingProxyType(
        {
            "lora_A": "down",
            "lora_B": "up",
            "task_specific.values": "lambda",
            "weights": "mixing",
        }
    ),
)
LORA = Method("lora", MappingProxyType({"lora_A": "down", "lora_B": "up"}))
DORA = Method(
    "adapterhub_dora",
    MappingProxyType({"lora_A": "down", "lora_B": "up", "m.weight": "magnitude"}),
    frozenset({"m.weight"}),
)
IA3 = Method("ia3", MappingProxyType({"lora_B": "scale"}), frozenset({"lora_B"}))


@dataclass(frozen=True)
class AdapterLayers:
    """One adapter, read.

    Attributes:
        family: Name in ``adapters.family.FAMILIES``.
        layers: By module, as the file names it; per-task tensors without a task axis.
        ledger: What becomes of each tensor of the adapter's file.
    """

    family: str
    layers: Mapping[str, LayerTensors]
    ledger: tuple[LedgerEntry, ...]


def read_layers(stored: StoredAdapter) -> AdapterLayers:
    """Return the layers of one adapter.

    Raises:
        AdapterError: The method is no fixed change of a linear layer, or not supported.
        CheckpointError: A tensor is missing, unknown, or not of the shape the config says.
    """
    method = _method(stored)
    hyper = _hyper(stored, method)
    found: dict[str, dict[str, Tensor]] = {}
    ledger, problems = [], []
    for key, tensor in stored.tensors.items():
        module, _, suffix = key.partition(f".loras.{stored.name}.")
        if suffix in method.roles:
            found.setdefault(module, {})[suffix] = tensor
            fate = "stacked" if method.roles[suffix] in {"lambda", "mixing"} else "folded"
            ledger.append(LedgerEntry(stored.ledger_prefix + key, fate))  # type: ignore[arg-type]
        elif _TIED in key:
            ledger.append(tied_copy(stored.ledger_prefix + key))
        else:
            problems.append(f"unknown {key!r}")
    for module, tensors in found.items():
        problems += _misshapen(module, tensors, stored, method)
    if problems or not found:
        raise CheckpointError(
            f"{stored.where}: {shortened(problems) if problems else 'no adapter tensor'}",
            expected=(
                f"for each module .loras.{stored.name}. and {', '.join(method.roles)}, because "
                "adapter_config.json says so"
            ),
            fix="Save the adapter again with adapters 1.3.0",
        )
    layers = {
        module: LayerTensors(
            module,
            {method.roles[suffix]: _vector(t, suffix, method) for suffix, t in tensors.items()},
            hyper,
        )
        for module, tensors in found.items()
    }
    return AdapterLayers(method.family, MappingProxyType(layers), tuple(ledger))


def tied_copy(key: str) -> LedgerEntry:
    """Return the entry of a tensor that ``share_parameters`` keeps a second time."""
    return LedgerEntry(key, "known-dead", "the copy that share_parameters ties the adapters to")


def stack(name: str, tensors: list[Tensor]) -> Tensor:
    """Return equally shaped tensors of T tasks as one lazy ``[T, ...]``, without loss."""
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64"

    def load() -> Array:
        if dtype == "F64":
            return np.stack([tensor.widened().astype(np.float64) for tensor in tensors])
        return np.stack([tensor.numpy() for tensor in tensors])

    return Tensor(name, dtype, (len(tensors), *tensors[0].shape), load)


def _method(stored: StoredAdapter) -> Method:
    """Return how to read the adapter, or refuse it with the reason."""
    config = stored.config
    architecture, composition = config["architecture"], config.get("composition_mode", "add")
    if architecture not in {"lora", "mtl_lora"}:
        raise _refused(
            stored,
            f"architecture {architecture!r}",
            "it is not a change of linear layers alone, so no weight can hold it",
        )
    if config.get("use_gating"):
        raise _refused(
            stored, "use_gating", "the gate depends on the input, so no weight can hold it"
        )
    if config.get("vera_d") is not None or config.get("vera_b") is not None:
        raise _refused(
            stored, "VeRA or DVoRA", "its factors are as large as the layer, not low rank"
        )
    if architecture == "mtl_lora":
        if config.get("use_dora"):
            raise _refused(stored, "MTL-LoRA with use_dora", "no version of adapters can train it")
        if config.get("task_specific_matrix_type", "singular_values") != "singular_values":
            raise _refused(
                stored,
                f"task_specific_matrix_type {config['task_specific_matrix_type']!r}",
                "no version of adapters can train a full Lambda",
            )
    if composition == "scale":
        return _plain(stored, IA3) if architecture == "lora" else _no_mode(stored, composition)
    if composition != "add":
        return _no_mode(stored, composition)
    if architecture == "mtl_lora":
        return MTL_LORA
    return DORA if config.get("use_dora") else LORA


def _plain(stored: StoredAdapter, method: Method) -> Method:
    if stored.config.get("use_dora") or stored.config.get("r") != 1:
        raise _refused(stored, "composition_mode 'scale' that is no (IA)^3", "r must be 1")
    return method


def _no_mode(stored: StoredAdapter, composition: object) -> Method:
    raise _refused(stored, f"composition_mode {composition!r}", "how it adds to a layer is unknown")


def _refused(stored: StoredAdapter, found: str, why: str) -> AdapterError:
    return AdapterError(
        f"{stored.where}: adapter {stored.name!r}: {found} is not supported: {why}",
        expected="MTL-LoRA with a diagonal Lambda, LoRA, DoRA or (IA)^3, without gates",
        fix="Train one of these, or run this adapter with the adapters library itself",
    )


def _hyper(stored: StoredAdapter, method: Method) -> Mapping[str, float]:
    """Return the numbers that are not tensors.

    Raises:
        CheckpointError: One is missing in the config or no number.
    """
    names = ["alpha", "r"] + (["weights_sharpness"] if method is MTL_LORA else [])
    bad = [name for name in names if not _is_number(stored.config.get(name))]
    if bad:
        raise CheckpointError(
            f"{stored.where}: "
            f"{', '.join(f'{name} is {stored.config.get(name)!r}' for name in bad)}",
            expected="positive numbers, because the delta is computed with them",
            fix="Restore adapter_config.json as adapters wrote it",
        )
    rank, alpha = float(stored.config["r"]), float(stored.config["alpha"])
    if method is MTL_LORA:
        return {"alpha": alpha, "temperature": float(stored.config["weights_sharpness"])}
    if _is_before(stored.facts["version"], FIRST_WITH_ALPHA):
        alpha = rank
    return {"alpha": alpha, "scaling": alpha / rank}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_before(version: str, release: tuple[int, int, int]) -> bool:
    """Return whether ``version``, such as "adapters.1.0.1.dev0", is older than ``release``.

    A development or pre-release version is older than its release. Versions without the
    prefix are those of the predecessor, adapter-transformers, where alpha counted.
    """
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    if match is None:
        return False
    numbers = (int(match[1]), int(match[2]), int(match[3] or 0))
    is_early = bool(re.match(r"\.?(dev|a|b|rc)", match[4]))
    return numbers < release or (numbers == release and is_early)


def _misshapen(
    module: str, tensors: Mapping[str, Tensor], stored: StoredAdapter, method: Method
) -> list[str]:
    """Return what is wrong with one module's tensors, given the config."""
    missing = [f"missing {module}.loras.{stored.name}.{s}" for s in method.roles.keys() - tensors]
    if missing:
        return sorted(missing)
    rank = int(stored.config["r"])
    shapes = {suffix: tensor.shape for suffix, tensor in tensors.items()}
    up = shapes["lora_B"]
    fits: dict[str, Callable[[], bool]] = {
        "lora_A": lambda: len(shapes["lora_A"]) == 2 and shapes["lora_A"][0] == rank,
        "lora_B": lambda: up[-1:] == (rank,) and len(up) == (3 if method is MTL_LORA else 2),
        "m.weight": lambda: shapes["m.weight"] == (up[0], 1),
        "task_specific.values": lambda: shapes["task_specific.values"] == (rank,),
        "weights": lambda: shapes["weights"] == up[:1],
    }
    return [
        f"{tensor.name!r} is {list(tensor.shape)} with r = {rank}"
        + (" (a fused query-key-value layer?)" if suffix == "lora_A" else "")
        for suffix, tensor in tensors.items()
        if not fits[suffix]()
    ]


def _vector(tensor: Tensor, suffix: str, method: Method) -> Tensor:
    """Return a tensor stored as one column as a vector, others as they are."""
    if suffix not in method.vectors:
        return tensor
    return Tensor(
        tensor.name,
        tensor.dtype,
        tensor.shape[:1],
        lambda: tensor.numpy().reshape(-1),
        tensor.file,
        tensor.offset_bytes,
    )
