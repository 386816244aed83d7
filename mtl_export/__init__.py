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
    from mtl_export.adapters.modules.save import save_checkpoint
    from mtl_export.api.bench import bench
    from mtl_export.api.parity import parity
    from mtl_export.api.trt import build_engines
    from mtl_export.api.verify import verify
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.formats.own_folder import write_folder as write_checkpoint
    from mtl_export.checkpoint.reader import open_checkpoint
    from mtl_export.errors import MtlExportError

__version__ = VERSION

__all__ = [
    "MtlExportError",
    "__version__",
    "bench",
    "bind",
    "build_engines",
    "open_base",
    "open_checkpoint",
    "parity",
    "read_adapters",
    "save_checkpoint",
    "verify",
    "write_checkpoint",
]

# public name -> module, name there; "" for a package that is called as the verb of its name
_LAZY = {
    "MtlExportError": ("mtl_export.errors", "MtlExportError"),
    "bench": ("mtl_export.bench", ""),
    "bind": ("mtl_export.adapters.binding", "bind"),
    "build_engines": ("mtl_export.api.trt", "build_engines"),
    "open_base": ("mtl_export.checkpoint.base_model", "open_base"),
    "open_checkpoint": ("mtl_export.checkpoint.reader", "open_checkpoint"),
    "parity": ("mtl_export.parity", ""),
    "read_adapters": ("mtl_export.adapters.family", "read_adapters"),
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
