from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.errors import IntegrityError
from mtl_export.merge.layout import Layout
from mtl_export.merge.verify import verify_task
from mtl_export.merge.writer import MergeOptions, layout_of, write_tasks
from tests.merge import bases

FOLDED, COPIED = "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"


def written(folder: Path, source: str, dtype: str | None) -> tuple[BoundModel, Task, Layout, Path]:
    """Return a toy's last task, merged below ``folder``."""
    base = bases.write_base(folder / "base", dtype=source)
    bound = bases.bound_model(base, bases.write_checkpoint(folder / "adapter"))
    task = bound.adapters.tasks[-1]
    plan = layout_of(bound, [task], MergeOptions(dtype=dtype))
    out = folder / "out"
    out.mkdir()
    write_tasks(bound, {task: out}, plan)
    return bound, task, plan, out


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_a_merge_holds(source: str, dtype: str | None, tmp_path: Path) -> None:
    """Everything written is read and compared, whatever the dtypes."""
    bound, task, plan, out = written(tmp_path, source, dtype)
    count = sum(int(np.prod(t.shape)) for t in bound.base.tensors.values())
    assert verify_task(bound, task, plan, out, out) == count


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [FOLDED, COPIED])
@pytest.mark.parametrize("step", [1, -1])
def test_one_wrong_last_bit_is_found(name: str, dtype: str, step: int, tmp_path: Path) -> None:
    """The neighbour above or below is not the nearest, and is named."""
    bound, task, plan, out = written(tmp_path, "BF16", dtype)
    file = out / "model.safetensors"
    tensor = open_safetensors(file).tensors[name]
    itemsize = tensor.numpy().itemsize
    offset = tensor.offset_bytes + 17 * itemsize
    unsigned = {2: np.uint16, 4: np.uint32}[itemsize]
    bits = tensor.numpy().reshape(-1).view(unsigned)[17]
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write((bits + unsigned(step)).tobytes() if step > 0 else (bits - 1).tobytes())
    with pytest.raises(IntegrityError) as caught:
        verify_task(bound, task, plan, out, out)
    size = int(np.prod(tensor.shape))
    assert caught.value.problem.endswith(f"not base + delta: {name} (1 of {size} elements)")


def test_another_tasks_weights_are_found(tmp_path: Path) -> None:
    """Merging the wrong task is no small rounding error."""
    bound, _, plan, out = written(tmp_path, "F32", None)
    other = bound.adapters.tasks[0]
    swapped = Layout(
        own={other.name: layout_of(bound, [other], MergeOptions()).own[other.name]}, shared=()
    )
    assert plan.own
    with pytest.raises(IntegrityError):
        verify_task(bound, other, swapped, out, out)
