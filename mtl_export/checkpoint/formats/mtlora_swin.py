"""MTLoRA checkpoints (scale-lab/MTLoRA, Swin, dense prediction): a whole model in one file.

``ckpt_epoch_N.pth`` holds base weights, adapters, heads and buffers. Under an adapted
linear layer M, with stage s = N of ``backbone.layers.N``

    M.linear.weight, M.linear.bias       the base layer        copied as M.weight, M.bias
    M.lora_shared_A [r, I], _B [O, r]    shared by all tasks   shared_down, shared_up
    M.lora_tasks_A.T, M.lora_tasks_B.T   of task T             task_down_i, task_up_i
    M.lora_norm.weight, .bias [O]        mode "addition"       norm_weight, norm_bias
    M.lora_shared_scale [1]              if trained            shared_scale
    M.lora_task_scale.T [1]              in some forks         task_scale_i

with i the position of T in the configuration's TASKS. ``hyper``: ``shared_scale`` and
``task_scale_i`` from the configuration where they were not trained (used as they are, never
divided by the rank), and ``mode``: 0 matrix, 1 matrixv2, 2 addition.

Some tensors reach no output; the ledger lists them with the reason. Forks whose keys look
alike but mean something else are refused by those keys.

Source of names and rules: https://github.com/scale-lab/MTLoRA/tree/333a375, models/lora.py,
models/swin_transformer_mtlora.py, config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    Fate,
    LayerTensors,
    LedgerEntry,
    Task,
    check_task_names,
)
from mtl_export.checkpoint.formats.mtlora_swin_file import StoredModel, is_mtlora, read_stored
from mtl_export.checkpoint.formats.mtlora_swin_settings import MODES, SwinSettings, settings_of
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import AdapterError, CheckpointError, UsageError, shortened

FORMAT = "mtlora"
FAMILY = "mtlora_swin"
DESCRIPTION = "scale-lab/MTLoRA: Swin for dense prediction"
LOOKS_FOR = "ckpt_epoch_<N>.pth with keys such as ....lora_shared_A and ....lora_tasks_A.<task>"

__all__ = ["DESCRIPTION", "FORMAT", "LOOKS_FOR", "is_mtlora", "read_mtlora"]

# Keys that only a fork writes -> which, and what is different there.
FORKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".*_log_m(\..*)?"), "FAAR normalises each update and learns its length"),
    (re.compile(r".*\.lora_rank_extractors\..*"), "PoRA-CARA's updates depend on the input"),
    (re.compile(r".*_groups\..*"), "PoRA-CARA shares updates by groups of tasks"),
    (re.compile(r".*\.lora_route\..*"), "this mtLoRA routes by token"),
    (re.compile(r".*\.qkv\.[qkv]\..*"), "SPLIT_QKV, which the original cannot build"),
    (re.compile(r".*\.linear\.linear\..*"), "mtlora_dinov3 is another model"),
    (re.compile(r".*\.lora_[AB](\..*)?"), "plain LoRA layers, which the original does not use"),
)
_ADAPTER = re.compile(
    r"(?P<module>backbone\.layers\.(?P<stage>\d+)\..+)\.(?:"
    r"lora_shared_(?P<shared>[AB])|lora_tasks_(?P<side>[AB])\.(?P<task>.+)"
    r"|lora_norm\.(?P<norm>weight|bias)|lora_(?P<scale>shared_scale)"
    r"|lora_task_scale\.(?P<scaled>.+))"
)
_BACKBONE = re.compile(
    r"backbone\.(?:absolute_pos_embed|patch_embed\.(?:proj|norm)\.(?:weight|bias)"
    r"|layers\.\d+\.(?:blocks\.\d+\.(?:attn_mask|norm[12]\.(?:weight|bias)"
    r"|attn\.relative_position_(?:bias_table|index)"
    r"|(?:attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:linear\.)?(?:weight|bias))"
    r"|downsample\.(?:norm\.(?:weight|bias)|reduction\.(?:linear\.)?weight)))"
)
_HEAD = re.compile(r"(?:downsampler|decoders\.decoders)\.(?P<task>[^.]+)\..+")
_SIDES = {"A": "down", "B": "up"}
# Where each kind of head ends: its rows are the task's output channels.
_LAST_CONVOLUTIONS = ("last_layer.3.weight", "4.weight", "linear_pred.weight")


@dataclass(frozen=True, slots=True)
class _Key:
    """An adapter tensor's place: module, stage, role, and the task it is of."""

    module: str
    stage: int
    role: str


def read_mtlora(
    path: Path, order: Sequence[str] | None = None, *, train_config: Path | None = None
) -> Checkpoint:
    """Return the checkpoint that ``path`` is or holds.

    Args:
        path: The file, or the folder with the only one.
        order: Tasks in id order, where the configuration lists none.
        train_config: YAML of the training run, where the file has no configuration in it.

    Raises:
        IntegrityError: The file asks for more than tensors and a configuration.
        AdapterError: It is a fork's.
        CheckpointError: It is broken, a tensor is unknown, or it contradicts the configuration.
        UsageError: ``order`` is not the configuration's.
    """
    stored = read_stored(path, train_config)
    _refuse_forks(stored)
    settings = settings_of(str(stored.files[-1]), stored.config)
    tasks = _tasks(path, stored, settings, order)
    keys = {name: key for name in stored.tensors if (key := _place(name, tasks))}
    _refuse_unknown(stored, keys, tasks)
    layers = _layers(stored, settings, keys, tasks)
    adapted = tuple(f"{module}.linear." for module in layers)
    return Checkpoint(
        path=path,
        format=FORMAT,
        family=FAMILY,
        tasks=tuple(Task(name, index) for index, name in enumerate(tasks)),
        layers=MappingProxyType(layers),
        heads=MappingProxyType({}),
        base=BaseReference(),
        model_class="",
        sha256=sha256_of_files(stored.files),
        replaced=MappingProxyType(
            {
                name.replace(".linear.", ".") if name.startswith(adapted) else name: tensor
                for name, tensor in stored.tensors.items()
                if name not in keys
            }
        ),
        ledger=_ledger(stored, layers, keys),
        notes=_notes(stored, settings, tasks),
        swin=replace(settings, tasks=tasks),
    )


def _refuse_forks(stored: StoredModel) -> None:
    for pattern, difference in FORKS:
        found = [name for name in stored.tensors if pattern.fullmatch(name)]
        if found:
            raise AdapterError(
                f"{stored.files[0]}: keys of a fork of MTLoRA: {shortened(found, 2)}",
                expected=f"keys of scale-lab/MTLoRA, because {difference}",
                fix="Merge it with the fork's own code and export the result",
            )


def _tasks(
    path: Path, stored: StoredModel, settings: SwinSettings, order: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the tasks in id order."""
    found = {match["task"] for name in stored.tensors if (match := _HEAD.fullmatch(name))}
    known = settings.tasks or tuple(order or ())
    if not known:
        raise CheckpointError(
            f"{stored.files[-1]}: no TASKS",
            expected="the tasks in id order, because a task's id is its place there",
            fix=f"Pass --tasks {','.join(sorted(found))} in the order of training",
        )
    if set(known) != found or (order is not None and tuple(order) != known):
        raise UsageError(
            f"tasks {','.join(order or known)}: the checkpoint has heads of "
            f"{shortened(sorted(found), 8)}"
            + (f", trained as {','.join(settings.tasks)}" if settings.tasks else ""),
            expected="the same tasks",
            fix="Correct --tasks (or tasks in mtl-export.toml)",
        )
    check_task_names(str(path), list(known))
    return known


def _place(name: str, tasks: Sequence[str]) -> _Key | None:
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return None
    task = match["task"] or match["scaled"]
    if task is not None and task not in tasks:
        return None
    if match["shared"]:
        role = f"shared_{_SIDES[match['shared']]}"
    elif match["task"]:
        role = f"task_{_SIDES[match['side']]}_{tasks.index(match['task'])}"
    elif match["norm"]:
        role = f"norm_{match['norm']}"
    else:
        role = match["scale"] or f"task_scale_{tasks.index(match['scaled'])}"
    return _Key(match["module"], int(match["stage"]), role)


def _refuse_unknown(stored: StoredModel, keys: Mapping[str, _Key], tasks: Sequence[str]) -> None:
    unknown = [
        name
        for name in stored.tensors
        if name not in keys
        and not _BACKBONE.fullmatch(name)
        and not ((match := _HEAD.fullmatch(name)) and match["task"] in tasks)
    ]
    if unknown:
        raise CheckpointError(
            f"{stored.files[0]}: {len(unknown)} unknown tensors: {shortened(map(repr, unknown))}",
            expected=(
                "the tensors of a Swin backbone, its adapters, and heads per task, because a "
                "tensor that is ignored would change the model silently"
            ),
            fix="Save the checkpoint again with scale-lab/MTLoRA at 333a375",
        )


def _layers(
    stored: StoredModel, settings: SwinSettings, keys: Mapping[str, _Key], tasks: Sequence[str]
) -> dict[str, LayerTensors]:
    """Return the adapted layers, once their tensors fit each other and the configuration."""
    found: dict[str, dict[str, Tensor]] = {}
    stages = {key.module: key.stage for key in keys.values()}
    for name, key in keys.items():
        found.setdefault(key.module, {})[key.role] = stored.tensors[name]
    layers, problems = {}, []
    for module, roles in found.items():
        has_tasks = any(role.startswith("task_") for role in roles)
        mode = settings.mode if has_tasks else "matrix"
        problems += _misfits(module, roles, stored.tensors, mode, len(tasks) if has_tasks else 0)
        problems += _unknown_scales(module, roles, settings, len(tasks) if has_tasks else 0)
        hyper = {"mode": float(MODES.index(mode))}
        scales = settings.scales(stages[module], tasks)
        hyper |= {name: value for name, value in scales.items() if name not in roles
                  and (has_tasks or name == "shared_scale")}  # fmt: skip
        layers[module] = LayerTensors(
            module, MappingProxyType(roles), MappingProxyType(dict(sorted(hyper.items())))
        )
    if problems:
        raise CheckpointError(
            f"{stored.files[0]}: {len(problems)} tensors do not fit: {shortened(problems)}",
            expected=f"A [r, I] and B [O, r] of each layer, as in mode {settings.mode}",
            fix="Pair the checkpoint with the configuration of its own run",
        )
    return layers


def _unknown_scales(
    module: str, roles: Mapping[str, Tensor], settings: SwinSettings, task_count: int
) -> list[str]:
    """Return the scales of a layer that were trained and are not stored."""
    own = {f"task_scale_{index}" for index in range(task_count)}
    wanted = own if "task_scale" in settings.trained or own & roles.keys() else set()
    if "shared_scale" in settings.trained and "shared_down" in roles:
        wanted = {*wanted, "shared_scale"}
    return [f"{module} lacks {role}, which was trained" for role in sorted(wanted - roles.keys())]


def _misfits(
    module: str,
    roles: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    mode: str,
    task_count: int,
) -> list[str]:
    """Return what is wrong with one layer."""
    weight = tensors.get(f"{module}.linear.weight")
    if weight is None:
        return [f"{module}.linear.weight is missing"]
    outputs, inputs = weight.shape
    pairs = [f"task_{{}}_{index}" for index in range(task_count)]
    pairs += [] if mode == "addition" else ["shared_{}"]
    problems = []
    for pair in pairs:
        down, up = roles.get(pair.format("down")), roles.get(pair.format("up"))
        if down is None or up is None:
            problems.append(f"{module} lacks {pair.format('down')} or {pair.format('up')}")
        elif (down.shape[1:], up.shape) != ((inputs,), (outputs, *down.shape[:1])):
            problems.append(f"{module}: {down.shape} and {up.shape} for [{outputs}, {inputs}]")
    if ("norm_weight" in roles) != (mode == "addition"):
        problems.append(f"{module} has {'a' if 'norm_weight' in roles else 'no'} lora_norm")
    return problems


def _ledger(
    stored: StoredModel, layers: Mapping[str, LayerTensors], keys: Mapping[str, _Key]
) -> tuple[LedgerEntry, ...]:
    entries = []
    for name in stored.tensors:
        key = keys.get(name)
        if key is not None:
            reason = _why_dead(key, layers)
            fate: Fate = "stacked" if key.role.startswith("task_") else "folded"
            entries.append(LedgerEntry(name, "known-dead" if reason else fate, reason))
        elif name.endswith("num_batches_tracked"):
            entries.append(LedgerEntry(name, "known-dead", "counts training batches"))
        elif ".conv_seg." in name:
            entries.append(LedgerEntry(name, "known-dead", "the head never reads it"))
        else:
            entries.append(LedgerEntry(name, "head" if _HEAD.fullmatch(name) else "copied"))
    entries += [LedgerEntry(name, "known-dead", "training state") for name in stored.others]
    return tuple(entries)


def _why_dead(key: _Key, layers: Mapping[str, LayerTensors]) -> str:
    """Return why an adapter tensor reaches no output; empty if it does."""
    layer = layers[key.module]
    mode = MODES[int(layer.hyper["mode"])]
    has_tasks = any(role.startswith("task_") for role in layer.tensors)
    stage, last = f"backbone.layers.{key.stage}.blocks.", _last_block(key.stage, layers)
    final = f"backbone.layers.{max(map(_stage, layers))}.blocks."
    is_last = key.module.startswith(f"{stage}{last}.")
    is_final = is_last and stage == final and key.module.endswith(".mlp.fc2") and has_tasks
    if key.role.startswith("task_"):
        if mode != "addition" and not is_last:
            return "only the last block of a stage passes task features on"
        consumer = layers.get(f"{stage}{last}.mlp.fc2")
        if mode != "addition" and not (
            consumer and any(role.startswith("task_") for role in consumer.tensors)
        ):
            return "without task terms in mlp.fc2 the task features are dropped"
    elif key.role == "shared_scale" and mode == "addition":
        return "mode addition never reads it"
    elif is_final and mode != "matrixv2":
        return "nothing reads the shared output of the last layer"
    return ""


def _stage(module: str) -> int:
    return int(module.split(".")[2])


def _last_block(stage: int, layers: Mapping[str, LayerTensors]) -> int:
    prefix = f"backbone.layers.{stage}.blocks."
    blocks = [m.removeprefix(prefix).split(".")[0] for m in layers if m.startswith(prefix)]
    return max(map(int, blocks), default=-1)


def _notes(stored: StoredModel, settings: SwinSettings, tasks: Sequence[str]) -> tuple[str, ...]:
    notes = [f"mode {settings.mode}; scales of each stage: {settings.described(tasks)}"]
    for task in tasks:
        ends = (f"decoders.decoders.{task}.{name}" for name in _LAST_CONVOLUTIONS)
        last = next((stored.tensors[name] for name in ends if name in stored.tensors), None)
        channels = f"{last.shape[0]} output channels" if last else "unknown output channels"
        notes.append(f"{task}: {channels}, head {settings.head(task)}")
    return tuple(notes)
