"""Deploy multi-task LoRA checkpoints: merge, export, build engines, prove parity.

This is the public face; the rest may change between minor versions. Names are
imported when first used, so ``import mtl_export`` costs milliseconds and no torch.
Services import ``mtl_export.runtime.TaskSession``, which needs neither torch nor onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mtl_export.version import VERSION

if TYPE_CHECKING:
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.adapters.modules.model import MultiTaskModel
    from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
    from mtl_export.adapters.modules.save import save_checkpoint
    from mtl_export.adapters.modules.ta_lora import TALoRALinear
    from mtl_export.api.bench import bench
    from mtl_export.api.inspect import inspect
    from mtl_export.api.merge import merge
    from mtl_export.api.onnx import export_onnx
    from mtl_export.api.parity import parity
    from mtl_export.api.plan import plan
    from mtl_export.api.tasks import add_task, remove_task, rename_task
    from mtl_export.api.trt import build_engines
    from mtl_export.api.verify import verify
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.checkpoint.formats.own_folder import write_folder as write_checkpoint
    from mtl_export.checkpoint.reader import open_checkpoint
    from mtl_export.dense.merged import load_dense
    from mtl_export.errors import MtlExportError
    from mtl_export.runtime import TaskSession

__version__ = VERSION

__all__ = [
    "MTLLoRALinear",
    "MtlExportError",
    "MultiTaskModel",
    "TALoRALinear",
    "Task",
    "TaskSession",
    "__version__",
    "add_task",
    "bench",
    "bind",
    "build_engines",
    "export_onnx",
    "inspect",
    "load_dense",
    "merge",
    "open_base",
    "open_checkpoint",
    "parity",
    "plan",
    "read_adapters",
    "remove_task",
    "rename_task",
    "save_checkpoint",
    "verify",
    "write_checkpoint",
]

# public name -> module, name there; "" for a package that is called as the verb of its name
_LAZY = {
    "MTLLoRALinear": ("mtl_export.adapters.modules.mtl_lora", "MTLLoRALinear"),
    "MtlExportError": ("mtl_export.errors", "MtlExportError"),
    "MultiTaskModel": ("mtl_export.adapters.modules.model", "MultiTaskModel"),
    "TALoRALinear": ("mtl_export.adapters.modules.ta_lora", "TALoRALinear"),
    "Task": ("mtl_export.checkpoint.checkpoint", "Task"),
    "TaskSession": ("mtl_export.runtime", "TaskSession"),
    "add_task": ("mtl_export.api.tasks", "add_task"),
    "bench": ("mtl_export.bench", ""),
    "bind": ("mtl_export.adapters.binding", "bind"),
    "build_engines": ("mtl_export.api.trt", "build_engines"),
    "export_onnx": ("mtl_export.api.onnx", "export_onnx"),
    "inspect": ("mtl_export.api.inspect", "inspect"),
    "load_dense": ("mtl_export.dense.merged", "load_dense"),
    "merge": ("mtl_export.merge", ""),
    "open_base": ("mtl_export.checkpoint.base_model", "open_base"),
    "open_checkpoint": ("mtl_export.checkpoint.reader", "open_checkpoint"),
    "parity": ("mtl_export.parity", ""),
    "plan": ("mtl_export.api.plan", "plan"),
    "read_adapters": ("mtl_export.adapters.family", "read_adapters"),
    "remove_task": ("mtl_export.api.tasks", "remove_task"),
    "rename_task": ("mtl_export.api.tasks", "rename_task"),
    "save_checkpoint": ("mtl_export.adapters.modules.save", "save_checkpoint"),
    "verify": ("mtl_export.api.verify", "verify"),
    "write_checkpoint": ("mtl_export.checkpoint.formats.own_folder", "write_folder"),
}


def __getattr__(name: str) -> object:
    """Import the public name ``name`` on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, attribute = _LAZY[name]
    module = import_module(place)
    value: object = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, so that completion shows them before first use."""
    return sorted({*globals(), *__all__})
