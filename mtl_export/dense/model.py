"""From an MTLoRA file to its model: checked against itself, at any size of image it can have.

The file is the whole model, and no base belongs to it. What the layers are follows from the
tensors; a tensor that is missing, or that nothing would read, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mtl_export.adapters.modules.dense_heads import HEADS, head_kind
from mtl_export.adapters.modules.mtlora_layers import SwinModel
from mtl_export.adapters.modules.mtlora_swin import COMPUTED, MTLoRASwin
from mtl_export.checkpoint.checkpoint import Checkpoint, Task
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor
from mtl_export.dense import fold
from mtl_export.errors import CheckpointError, UsageError, shortened


@dataclass(frozen=True)
class DenseModel:
    """A Swin for dense tasks, as trained.

    Attributes:
        checkpoint: What it was read from.
        stored: Its tensors by the trainer's names, on disk.
        described: What decides its numbers beside them.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, Tensor]
    described: SwinModel

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Return its tasks, in the order of the outputs."""
        return self.checkpoint.tasks

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return its tensors by the trainer's names, read once."""
        return {name: _read(one) for name, one in self.stored.items()}

    def trained(self, dtype: torch.dtype = torch.float32) -> MTLoRASwin:
        """Return the model as trained: unmerged, in evaluation mode, in ``dtype``."""
        return MTLoRASwin.from_tensors(self.tensors, self.described).to(dtype)

    def folded(self, tasks: Sequence[str]) -> tuple[dict[str, torch.Tensor], SwinModel]:
        """Return the folded tensors of the tasks, float32, and their description."""
        return fold.folded(self.tensors, self.described, tasks)

    def at(self, image_size: int) -> DenseModel:
        """Return the same model for images of another size.

        Raises:
            UsageError: No window divides that size.
        """
        problem = _size_problem(self.stored, image_size)
        if problem:
            trained = self.described.image_size
            near = [size for size in range(8, 4 * trained) if not _size_problem(self.stored, size)]
            raise UsageError(
                f"--image-size {image_size}: {problem}",
                expected=f"one of {shortened(map(str, near), 6)}",
                fix=f"Pass --image-size {trained}, or leave it out",
            )
        return replace(self, described=replace(self.described, image_size=image_size))


def _read(tensor: Tensor) -> torch.Tensor:
    """Return a stored tensor; floating ones in at least float32, as numpy has no bfloat16."""
    is_float = tensor.dtype in FLOAT_DTYPES
    return torch.from_numpy(tensor.widened() if is_float else tensor.numpy())


def open_dense(checkpoint: Checkpoint) -> DenseModel:
    """Return the model of a checkpoint of this kind, its tensors still on disk.

    Raises:
        CheckpointError: It has tensors missing or left over, an unknown head, scales that were
            trained and are not stored, or it contradicts its own configuration.
    """
    settings = checkpoint.swin
    if settings is None:
        raise ValueError(f"{checkpoint.path} is not a Swin with task streams")
    adapters = (one for layer in checkpoint.layers.values() for one in layer.tensors.values())
    stored = {one.name: one for one in (*checkpoint.replaced.values(), *adapters)}
    names = tuple(task.name for task in checkpoint.tasks)
    scales = {name: settings.task_scales.get(name, settings.shared_scale) for name in names}
    model = SwinModel(
        tasks=names,
        image_size=settings.image_size,
        mode=settings.mode,
        shared_scales=settings.shared_scale,
        task_scales=scales,
        qk_scale=settings.qk_scale,
    )
    _refuse_unknown_heads(checkpoint, stored)
    problem = _size_problem(stored, settings.image_size)
    if problem:
        raise _misfit(checkpoint, [f"DATA.IMG_SIZE {settings.image_size}: {problem}"])
    _refuse_misfits(checkpoint, stored, model)
    return DenseModel(checkpoint, stored, model)


def _refuse_unknown_heads(checkpoint: Checkpoint, stored: Mapping[str, Tensor]) -> None:
    shapes = {name: one.shape for name, one in stored.items()}
    for task in checkpoint.tasks:
        if not head_kind(shapes, f"decoders.decoders.{task.name}"):
            raise CheckpointError(
                f"{checkpoint.path}: task {task.name} has a head of an unknown kind",
                expected=f"one of {', '.join(HEADS)}",
                fix="Export that task with the code that trained it",
            )


def _refuse_misfits(checkpoint: Checkpoint, stored: Mapping[str, Tensor], model: SwinModel) -> None:
    """Refuse tensors that are missing, left over, or of another shape than the rest implies."""
    shapes = {name: one.shape for name, one in stored.items()}
    try:
        with torch.device("meta"):
            built = MTLoRASwin(shapes, model).eval()
    except KeyError as error:
        # PyTorch's word for a task that is called as a method of its containers.
        found = str(error.args[0])
        problem = found if "already exists" in found else f"{found} is missing"
        raise _misfit(checkpoint, [problem]) from error
    own = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    problems = [f"{name} is missing" for name in sorted(own.keys() - shapes.keys())]
    problems += [f"{name} is left over" for name in sorted(shapes.keys() - own.keys())]
    problems += [
        f"{name} is {list(shapes[name])}, not {list(own[name])}"
        for name in sorted(own.keys() & shapes.keys())
        if shapes[name] != own[name]
    ]
    computed = [name for name in problems if name.split()[0].endswith(COMPUTED)]
    if computed and len(computed) == len(problems):
        size = model.image_size
        problems = [f"DATA.IMG_SIZE {size} in its configuration, but {one}" for one in computed]
    problems = problems or _unconnected(built) or _other_values(built, stored)
    if problems:
        raise _misfit(checkpoint, problems)


def _unconnected(built: MTLoRASwin) -> list[str]:
    """Return what keeps an image from passing through, by shapes alone."""
    size = built.model.image_size
    try:
        built(torch.zeros(1, 3, size, size, device="meta"))
    except RuntimeError as error:
        return [f"layers do not take each other's output ({str(error).splitlines()[0]})"]
    return []


def _other_values(built: MTLoRASwin, stored: Mapping[str, Tensor]) -> list[str]:
    """Return the index tables and masks that are not those of shifted windows."""
    with torch.device("cpu"):
        own = MTLoRASwin({name: one.shape for name, one in stored.items()}, built.model)
    return [
        f"{name} holds other values than Swin's"
        for name, value in own.named_buffers()
        if name.endswith(COMPUTED) and not torch.equal(value, _read(stored[name]).to(value.dtype))
    ]


def _misfit(checkpoint: Checkpoint, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {len(problems)} tensors do not fit: {shortened(problems, 3)}",
        expected="the state dict of one MultiTaskSwin, whole, with the configuration of its run",
        fix="Save it again with scale-lab/MTLoRA at 333a375",
    )


def _size_problem(stored: Mapping[str, Tensor], size: int) -> str:
    """Return why the windows do not divide an image of ``size``; empty if they do."""
    patch = stored["backbone.patch_embed.proj.weight"].shape[2]
    tables = {name: one.shape[0] for name, one in stored.items()
              if name.endswith("relative_position_bias_table")}  # fmt: skip
    largest = max(map(_window, tables.values()), default=1)
    last = max(int(name.split(".")[2]) for name in tables)
    for name, rows in tables.items():
        stage, window = int(name.split(".")[2]), _window(rows)
        side, rest = divmod(size, patch * 2**stage)
        if rest or (stage < last and side % 2):
            return f"it does not give stage {stage} a whole and even number of tokens a side"
        if side % window or (window < largest and side != window):
            return f"stage {stage} has {side} tokens a side for windows of {window}"
    return ""


def _window(rows: int) -> int:
    return (int(rows**0.5 + 0.5) + 1) // 2
