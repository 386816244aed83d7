"""VL-BART checkpoints of the MTL-LoRA authors' repository: a whole model in one pickle.

``<run>/LAST.pth`` is the state dict of a BART whose encoder also takes image features,
saved from a distributed wrapper (``module.`` before every name), with mLoRALinear layers in
place of q_proj and v_proj. Biases, LayerNorms and the visual embedding were trained for all
tasks, so everything is taken from this file; the base gives config and tokenizer. Source:
https://github.com/pUmpKin-Co/MTL-LoRA/tree/7848a70/image_text_understanding/VL-T5/src,
files trainer_base.py (class mLoRALinear), modeling_bart.py and multitask.py.

| key after ``module.``                           | becomes                                    |
|-------------------------------------------------|--------------------------------------------|
| <layer>.lora_A [1, r, I]                        | down of the family mtl_lora                |
| <layer>.lora_lambdas, .lora_B, .lora_B_w        | lambda, up, mixing                         |
| model.shared.weight                             | itself                                     |
| model.{encoder,decoder}.embed_tokens.weight,    | dead: tied, the same numbers again         |
| ...obj_order_embedding.weight, lm_head.weight   |                                            |
| every other weight, bias and final_logits_bias  | itself, adapted layers' weights among them |

alpha, temperature and task names are asked for, as for the repository's other checkpoints, and
whether the run had --downsample. Of the other options in the trainer's param.py, those that
change the model's forward pass show in the tensors (use_vis_layer_norm, individual_vis_layer_norm)
or are refused by them (use_vis_order_embedding False, vis_use_transformer, expand_vis_embedding,
prompts, other adapters, classifier), are of training only (sparse_sample, dropout), or are in
``NOTES``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    LayerTensors,
    LedgerEntry,
    Task,
)
from mtl_export.checkpoint.files.torch_pickle import load_state_dict, stored_names
from mtl_export.checkpoint.formats.mtl_lora_repo import unwrapped, without_first
from mtl_export.checkpoint.formats.vl_bart_config import MODEL_CLASS, SHARED, VISUAL
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor
from mtl_export.errors import CheckpointError, shortened

NAME = "official-vlbart"
FILE = "LAST.pth"
NOTES = (
    "the trainer's multitask.py numbers its tasks vqa, gqa, nlvr, caption",
    "the trainer adds the special tokens <extra_id_*> and <vis_extra_id_*> to the base's"
    " tokenizer; exports copy the base's tokenizer as it is",
    "exports are right for runs without --oneddownsample and --share_vis_lang_layer_norm and, with"
    " --downsample, with --n_boxes 36, as the trainer's scripts have it: these leave no trace",
    "with --use_tasks_prompts texts begin with the trainer's prefix: 'vqa: ', 'gpa: ' (sic), 'nlvr:"
    " ', 'caption: '",
)
TIED = frozenset({
    "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    f"{VISUAL}.obj_order_embedding.weight", "lm_head.weight",
})  # fmt: skip
_ADAPTER = re.compile(r"(?P<module>.+)\.(?P<name>lora_A|lora_lambdas|lora_B|lora_B_w)")
_ROLES = {"lora_A": "down", "lora_lambdas": "lambda", "lora_B": "up", "lora_B_w": "mixing"}
_PART = r"\.(weight|bias)"
# What the class VLBart has, and nothing of the repository's other methods.
_MODEL = re.compile(
    rf"{re.escape(SHARED)}|final_logits_bias"
    r"|model\.(encoder|decoder)\.(embed_positions\.weight|layernorm_embedding" + _PART + ")"
    r"|model\.(encoder|decoder)\.layers\.\d+\.("
    r"(self|encoder)_attn\.(q|k|v|out)_proj|(self_attn|encoder_attn|final)_layer_norm|fc[12])"
    + _PART
    + rf"|{re.escape(VISUAL)}\.((feat_embedding|absolute_vis_pos_embedding)\.[01]|layer_norm)"
    + _PART
    + rf"|{re.escape(VISUAL)}\.img_order_embedding\.weight"
)


def checkpoint_file(path: Path) -> Path | None:
    """Return the checkpoint file that ``path`` is or holds."""
    return next((file for file in (path, path / FILE) if file.is_file()), None)


def is_vlbart(path: Path) -> bool:
    """Return whether ``path`` is, or holds, a VL-BART's whole state dict."""
    file = checkpoint_file(path)
    if file is None or file.suffix not in {".pt", ".pth", ".bin"}:
        return False
    return any("encoder.visual_embedding." in name for name in stored_names(file))


def read_vlbart(path: Path) -> Checkpoint:
    """Return the checkpoint that ``path`` is or holds.

    Raises:
        CheckpointError: A tensor is unknown, empty or of a wrong dtype, there is no adapter,
            an adapted layer has no weight, or tied tensors differ.
        IntegrityError: The pickle asks to run code.
    """
    file = checkpoint_file(path)
    if file is None:
        raise CheckpointError(f"{path}: no {FILE}", expected="a checkpoint file")
    tensors = unwrapped(file, load_state_dict(file))
    layers, replaced, tied = _sorted_out(file, tensors)
    _check_tied(file, tied, replaced)
    counts = {layer.tensors["lambda"].shape[0] for layer in layers.values()}
    if len(counts) != 1:
        raise CheckpointError(
            f"{file}: layers for {', '.join(map(str, sorted(counts)))} tasks",
            expected="one number of tasks",
            fix="Save the state dict of a single run",
        )
    return Checkpoint(
        path=path,
        format=NAME,
        family="mtl_lora",
        tasks=tuple(Task(f"task{index}", index) for index in range(counts.pop())),
        layers=MappingProxyType(layers),
        heads=MappingProxyType({}),
        base=BaseReference(),
        model_class=MODEL_CLASS,
        sha256=sha256_of_files([file]),
        replaced=MappingProxyType(replaced),
        ledger=tuple(_fate(name) for name in tensors),
        notes=NOTES,
    )


def _sorted_out(
    file: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LayerTensors], dict[str, Tensor], dict[str, Tensor]]:
    """Return adapters by module, the model's own tensors, and the tied copies."""
    roles: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    tied: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.items():
        adapter = _ADAPTER.fullmatch(name)
        if tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name!r} has dtype {tensor.dtype}")
        elif 0 in tensor.shape:
            problems.append(f"{name!r} is empty")
        elif adapter:
            by_role = roles.setdefault(adapter["module"], {})
            shared = adapter["name"] == "lora_A"
            by_role[_ROLES[adapter["name"]]] = without_first(file, tensor) if shared else tensor
        elif name in TIED:
            tied[name] = tensor
        elif _MODEL.fullmatch(name):
            own[name] = tensor
        else:
            problems.append(f"unknown {name!r}")
    problems += [
        f"{module!r} has {', '.join(sorted(by_role))} but lacks its Lambda or base weight"
        for module, by_role in roles.items()
        if "lambda" not in by_role or f"{module}.weight" not in own
    ]
    if problems or not roles:
        raise CheckpointError(
            f"{file}: {shortened(problems) if problems else 'no mLoRALinear layers'}",
            expected=(
                "a VL-BART trained with --use_mlora on extracted features, because adapters of "
                "other methods, prompts and a trained image encoder are not supported"
            ),
            fix="Export a checkpoint of such a run",
        )
    layers = {
        module: LayerTensors(module, MappingProxyType(by_role), MappingProxyType({}))
        for module, by_role in roles.items()
    }
    return layers, own, tied


def _check_tied(file: Path, tied: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tied tensors that are not one: the model has one place for all of them."""
    problems = [] if SHARED in own else [f"no {SHARED!r}"]
    if not problems:
        shared = own[SHARED]
        values = shared.numpy()
        problems = [
            f"{name!r} differs"
            for name, tensor in tied.items()
            if tensor.shape != shared.shape or not np.array_equal(tensor.numpy(), values)
        ]
    if problems:
        raise CheckpointError(
            f"{file}: {shortened(problems)}",
            expected=(
                f"the same values as {SHARED!r} in {', '.join(sorted(TIED))}, because the model "
                "ties them: they are one parameter"
            ),
            fix="Save the state dict of the model as the trainer built it",
        )


def _fate(name: str) -> LedgerEntry:
    adapter = _ADAPTER.fullmatch(name)
    if adapter:
        is_shared = adapter["name"] in {"lora_A", "lora_B"}
        return LedgerEntry(name, "folded" if is_shared else "stacked")
    if name in TIED:
        return LedgerEntry(name, "known-dead", f"tied to {SHARED}: the same numbers again")
    return LedgerEntry(name, "copied")
