"""PEFT's tensor names into modules and roles; a name that no rule fits is refused.

A key is ``base_model.model.`` + module + one of

    .lora_A.weight .lora_B.weight .lora_B.bias       LoRA on a linear layer (or Conv1D)
    .lora_embedding_A .lora_embedding_B              LoRA on an embedding
    .lora_magnitude_vector  .lora_diag               DoRA's lengths; KaSA's diagonal
    .base_layer.bias                                 a trained bias of an adapted layer
    .base_layer.weight                               an embedding's own weight, untrained
    .token_adapter.trainable_tokens_delta            new rows of an embedding (not differences)
    .weight .bias                                    a tensor that takes the base's place

With bias="all" beside a saved head, ``<head>.modules_to_save.bias`` repeats the head's bias
(``<head>.modules_to_save.default.out_proj.bias`` where the head has layers) and
``<head>.original_module.bias`` is the base's unused one.

Source: https://github.com/huggingface/peft, release 0.21.2: ``utils/save_and_load.py``
(get_peft_model_state_dict), ``tuners/lora/layer.py`` (adapter_layer_names), and files that
it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mtl_export.checkpoint.checkpoint import Fate, LedgerEntry
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor
from mtl_export.errors import CheckpointError, shortened

ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_diag": "diagonal",
}
_MODULE = r"base_model\.model\.(?P<module>.+)\."
_ADAPTER = re.compile(_MODULE + f"(?P<suffix>{'|'.join(map(re.escape, ROLES))})")
_BASE_LAYER = re.compile(_MODULE + r"base_layer\.(?P<kind>weight|bias)")
_TOKENS = re.compile(_MODULE + r"token_adapter\.trainable_tokens_delta")
_WRAPPED = re.compile(_MODULE + r"(?P<copy>modules_to_save|original_module)\.(?P<inner>.+)")
_WHOLE = re.compile(_MODULE + "(?P<kind>weight|bias)")
# What PEFT itself puts into a module path; in a whole tensor's name it is a rule we lack.
_INFIX = re.compile(
    r"(^|\.)(lora_\w+|base_layer|token_adapter|modules_to_save|original_module)(\.|$)"
)


@dataclass
class SortedKeys:
    """An adapter's tensors, by what they are.

    Attributes:
        layers: Adapter tensors by module, then role.
        embeddings: Those modules that are embeddings.
        whole: Tensors in place of the base's, by name.
        rows: New rows of an embedding, by module.
        base_copies: Untrained copies of the base's tensors, by name.
        ledger: What becomes of each.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    ledger: list[LedgerEntry] = field(default_factory=list)

    def note(self, key: str, fate: Fate, reason: str = "") -> None:
        """Put ``key`` into the ledger."""
        self.ledger.append(LedgerEntry(key, fate, reason))


def sorted_keys(where: str, tensors: Mapping[str, Tensor]) -> SortedKeys:
    """Return ``tensors`` sorted by what they are.

    Raises:
        CheckpointError: A key fits no rule, or a tensor is not floating-point or empty.
    """
    found = SortedKeys()
    problems = []
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES or 0 in tensor.shape:
            problems.append(f"{key!r} is {tensor.dtype} {list(tensor.shape)}")
        elif not (_place_adapter(found, key, tensor) or _place_whole(found, tensors, key, tensor)):
            problems.append(f"{key!r}")
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} tensors that cannot be placed: {shortened(problems)}",
            expected=(
                "base_model.model.<module>.lora_A.weight and the other names that PEFT 0.21 "
                "writes, each a whole floating-point tensor, because a tensor that is ignored "
                "would change the model silently"
            ),
            fix="Save the adapter with PEFT's save_pretrained (under ZeRO-3 or FSDP, gather first)",
        )
    return found


def _place_adapter(found: SortedKeys, key: str, tensor: Tensor) -> bool:
    match = _ADAPTER.fullmatch(key)
    if match is None or _INFIX.search(match["module"]):
        return False
    module, suffix = match["module"], match["suffix"]
    found.layers.setdefault(module, {})[ROLES[suffix]] = tensor
    if suffix.startswith("lora_embedding"):
        found.embeddings.add(module)
    found.note(key, "folded")
    return True


def _place_whole(
    found: SortedKeys, tensors: Mapping[str, Tensor], key: str, tensor: Tensor
) -> bool:
    """Place a tensor that is no low-rank factor; return whether a rule fitted."""
    for pattern in (_BASE_LAYER, _TOKENS, _WRAPPED, _WHOLE):
        match = pattern.fullmatch(key)
        if match is not None and not _INFIX.search(match["module"]):
            break
    else:
        return False
    module = match["module"]
    if pattern is _TOKENS:
        found.rows[module] = tensor
        found.note(key, "copied", "rows of the embedding")
    elif pattern is _BASE_LAYER and match["kind"] == "weight":
        found.base_copies[f"{module}.weight"] = tensor
        found.note(key, "known-dead", "the base's own, untrained; compared with it")
    elif pattern is _WRAPPED:
        return _place_wrapped(found, tensors, key, tensor, match)
    else:
        found.whole[f"{module}.{match['kind']}"] = tensor
        found.note(key, "copied")
    return True


def _place_wrapped(
    found: SortedKeys,
    tensors: Mapping[str, Tensor],
    key: str,
    tensor: Tensor,
    match: re.Match[str],
) -> bool:
    if match["copy"] == "original_module":
        found.note(key, "known-dead", "the base's own head, which the trained one replaces")
        return True
    # An adapter's name may stand before the inner one.
    for inner in (match["inner"], match["inner"].partition(".")[2]):
        trained = tensors.get(f"base_model.model.{match['module']}.{inner}")
        if trained is not None and np.array_equal(trained.numpy(), tensor.numpy()):
            found.note(key, "known-dead", f"repeats {trained.name}")
            return True
    return False
