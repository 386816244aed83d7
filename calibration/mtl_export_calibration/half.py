"""A float graph -> the same in half precision, to tell what that costs in its place.

It is the graph that ``mtl-export onnx --dtype fp16`` writes, in a folder that lasts as long
as it is looked at. ONNX Runtime on a CPU stores its tensors in 16 bits and computes most
products in 32, as GPUs accumulate them; its speed there says nothing of a GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from mtl_export.graph.opened import open_graph
from mtl_export.graph.passes.precision import PrecisionPass

HALF = "fp16"


@contextmanager
def half_precision(path: Path, parent: Path) -> Iterator[Path]:
    """Give the file of the graph at ``path`` in half precision.

    Args:
        path: The float graph.
        parent: Holds the folder while it is there.

    Raises:
        GraphError: It cannot be narrowed.
    """
    model = PrecisionPass(HALF)(open_graph(path)).model
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=f"{HALF}-") as folder:
        file = Path(folder) / path.name
        ir.save(model, file, external_data=f"{path.name}.data")
        yield file
