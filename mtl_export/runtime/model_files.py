"""A model's file -> what runs it, and the files beside it that belong to the same model.

    model.onnx      itself, with *.onnx_adapter beside it under these
    prefill.onnx    with decode.onnx: a causal language model
    encoder.onnx    with decoder.onnx and decoder_with_past.onnx: an encoder-decoder
    *.engine        itself

Nothing is opened yet, and torch is imported only where an engine runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.errors import UsageError, shortened
from mtl_export.names import ENCODER_FILE, MODEL_FILE, PREFILL_FILE

if TYPE_CHECKING:
    from mtl_export.runtime.runners.base import Runner

ENGINE_SUFFIX = ".engine"
# What a folder of ONNX graphs is opened by, and the graphs beside it that generation needs.
PARTS = {
    MODEL_FILE: (),
    PREFILL_FILE: ("decode.onnx",),
    ENCODER_FILE: ("decoder.onnx", "decoder_with_past.onnx"),
}


def runner_of(path: Path, *, threads: int = 0) -> Runner:
    """Return the runner of the model whose file, or whose first file, is ``path``.

    Args:
        path: The file.
        threads: Threads inside one operator; 0 lets the runtime decide.
    """
    if path.suffix == ENGINE_SUFFIX:
        from mtl_export.tensorrt.runner import TensorRTBackend

        return TensorRTBackend(path)
    if path.name == PREFILL_FILE:
        from mtl_export.runtime.runners.language import OrtLanguageRunner

        return OrtLanguageRunner(path, decode="decode.onnx", threads=threads)
    if path.name == ENCODER_FILE:
        from mtl_export.runtime.runners.seq2seq import OrtSeq2SeqRunner

        return OrtSeq2SeqRunner(path.parent, threads=threads)
    if any(path.parent.glob("*.onnx_adapter")):
        from mtl_export.runtime.onnx_adapters import AdapterRunner

        return AdapterRunner(path, threads=threads)
    from mtl_export.runtime.ort import OrtRunner

    return OrtRunner(path, threads=threads)


def graph_file(path: Path) -> Path:
    """Return the graph to open: the file itself, or the first of a folder's.

    Raises:
        UsageError: There is none.
    """
    if path.is_file():
        first = next((name for name, rest in PARTS.items() if path.name in rest), path.name)
        return path.with_name(first)
    for name in PARTS:
        if (path / name).is_file():
            return path / name
    inside = sorted({str(file.parent) for name in PARTS for file in path.glob(f"*/{name}")})
    raise UsageError(
        f"{path}: none of {', '.join(PARTS)} there",
        expected="a folder that mtl-export onnx wrote",
        fix=f"One of these is: {shortened(inside)}"
        if inside
        else "Run mtl-export onnx --all-tasks",
    )
