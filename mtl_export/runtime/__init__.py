"""Artefacts into outputs: one backend per library, and ``TaskSession`` for services."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_export.runtime.answers import Answer
    from mtl_export.runtime.session import TaskOutputs, TaskSession

__all__ = ["Answer", "TaskOutputs", "TaskSession"]

# public name -> module; imported on first use, because the command line imports this package
_LAZY = {
    "Answer": "mtl_export.runtime.answers",
    "TaskOutputs": "mtl_export.runtime.session",
    "TaskSession": "mtl_export.runtime.session",
}


def __getattr__(name: str) -> object:
    """Import the public name ``name`` on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
