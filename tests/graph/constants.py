"""What every exported file must hold: constants that are tensors."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mtl_export.graph.passes.constants import short_constants


def short_constants_below(folder: Path) -> list[str]:
    """Return file and name of each constant below ``folder`` that is written without a tensor."""
    paths = sorted(folder.rglob("*.onnx"))
    if not paths:
        raise ValueError(f"no graphs below {folder}")
    return [
        f"{path.name}: {node.name}" for path in paths for node in short_constants(ir.load(path))
    ]
