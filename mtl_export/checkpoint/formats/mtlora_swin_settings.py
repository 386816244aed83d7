"""MTLoRA's configuration: what of it decides the numbers, however it was written down.

A stored configuration has derived lists (``SCALE_PER_TASK_LIST``, one entry per stage); a
YAML file that a user wrote has shorthands: one number for all stages, no per-task scales.
``TASK_SCALE`` is never read by the trainer, and not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_export.checkpoint.files.json_file import misfit
from mtl_export.errors import CheckpointError, shortened

MODES = ("matrix", "matrixv2", "addition")
STAGES = 4
TRAINED = {
    "TRAINABLE_SCALE_SHARED": "shared_scale",
    "TRAINABLE_SCALE_PER_TASK": "task_scale",
}


@dataclass(frozen=True)
class SwinSettings:
    """What decides the numbers.

    Attributes:
        mode: One of ``MODES``: how layers with task terms compute their shared output.
        tasks: In id order; empty if the configuration does not say.
        shared_scale: By stage.
        task_scales: By task, then by stage; a task that is not in it has the shared scale.
        heads: Kind of head, by task.
        image_size: Side of the image in pixels.
        qk_scale: Factor of q in attention; None for 1 / sqrt(width of a head).
        window: Side of attention's windows, in tokens.
        trained: Roles of scales that were trained, so that the file must hold them:
            ``shared_scale``, ``task_scale``.
    """

    mode: str
    tasks: tuple[str, ...]
    shared_scale: tuple[float, ...]
    task_scales: Mapping[str, tuple[float, ...]]
    heads: Mapping[str, str]
    image_size: int = 224
    qk_scale: float | None = None
    window: int = 7
    trained: tuple[str, ...] = ()

    def scales(self, stage: int, tasks: Sequence[str]) -> dict[str, float]:
        """Return the scales of one stage by role: ``shared_scale``, ``task_scale_0``, ..."""
        per_task = {
            f"task_scale_{index}": self.task_scales.get(task, self.shared_scale)[stage]
            for index, task in enumerate(tasks)
        }
        return {"shared_scale": self.shared_scale[stage], **per_task}

    def head(self, task: str) -> str:
        """Return the kind of head of a task."""
        return self.heads.get(task, "hrnet")

    def described(self, tasks: Sequence[str]) -> str:
        """Return all scales as text."""
        lists = {"shared": self.shared_scale}
        lists |= {task: self.task_scales.get(task, self.shared_scale) for task in tasks}
        return ", ".join(f"{name} {'/'.join(f'{v:g}' for v in v4)}" for name, v4 in lists.items())


def settings_of(where: str, config: Mapping[str, Any]) -> SwinSettings:
    """Return the settings in a configuration.

    Args:
        where: The file it came from, for messages.
        config: Dictionaries and lists, as in the YAML file.

    Raises:
        CheckpointError: A setting is missing, of a wrong kind, or not supported.
    """
    model = config.get("MODEL")
    lora = model.get("MTLORA") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(lora, dict):
        raise _refusal(where, ["no MODEL.MTLORA"])
    mode = {"add": "addition", "lora_only": "matrix"}.get(
        str(lora.get("SHARED_MODE", "matrix")), str(lora.get("SHARED_MODE", "matrix"))
    )
    problems = [] if mode in MODES else [f"SHARED_MODE {mode!r}"]
    if lora.get("SPLIT_QKV"):
        problems.append("SPLIT_QKV true, which the trainer cannot build")
    shared = _stages("SHARED_SCALE", lora.get("SHARED_SCALE", 2.0), problems)
    listed = lora.get("SCALE_PER_TASK_LIST")
    per_task = lora.get("SCALE_PER_TASK") or {}
    if isinstance(listed, (list, tuple)) and all(isinstance(stage, dict) for stage in listed):
        names = {name for stage in listed for name in stage}
        per_task = {name: [stage.get(name) for stage in listed] for name in sorted(names)}
    elif listed:
        problems.append("SCALE_PER_TASK_LIST is no list of scales by task")
    if not isinstance(per_task, dict):
        problems.append(f"SCALE_PER_TASK {per_task!r}")
        per_task = {}
    scales = {
        str(task): _stages(f"scale of {task}", value, problems) for task, value in per_task.items()
    }
    tasks = config.get("TASKS") or ()
    if problems or not isinstance(tasks, (list, tuple)):
        raise _refusal(where, problems or [f"TASKS {tasks!r}"])
    heads = model.get("DECODER_HEAD")
    settings = SwinSettings(
        mode=mode,
        tasks=tuple(map(str, tasks)),
        shared_scale=shared,
        task_scales=scales,
        heads={str(k): str(v) for k, v in heads.items()} if isinstance(heads, dict) else {},
        image_size=_value(config, "DATA.IMG_SIZE", int, 224, problems),
        qk_scale=_value(config, "MODEL.SWIN.QK_SCALE", float, None, problems),
        window=_value(config, "MODEL.SWIN.WINDOW_SIZE", int, 7, problems),
        trained=tuple(role for flag, role in TRAINED.items() if lora.get(flag)),
    )
    if problems:
        raise _refusal(where, problems)
    return settings


def _value(
    config: Mapping[str, Any], name: str, kind: type, default: Any, problems: list[str]
) -> Any:
    """Return one setting by its dotted name; the trainer's default where it does not stand."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return default
    if misfit(value, kind) is not None or value <= 0:
        problems.append(f"{name} {value!r}")
    return value


def _stages(name: str, value: object, problems: list[str]) -> tuple[float, ...]:
    """Return one number per stage; a single one counts for all."""
    numbers: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(numbers) == 1:
        numbers *= STAGES
    fits = len(numbers) == STAGES and all(misfit(number, float) is None for number in numbers)
    if not fits:
        problems.append(f"{name} {value!r}")
        return (math.nan,) * STAGES
    return tuple(float(number) for number in numbers)


def _refusal(where: str, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{where}: {shortened(problems)}",
        expected=(
            f"MODEL.MTLORA with SHARED_MODE, one scale for each of {STAGES} stages, and sizes in "
            "whole numbers, because they are not in the state dict"
        ),
        fix="Use the configuration that the trainer wrote beside the checkpoint",
    )
