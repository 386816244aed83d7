"""An ONNX file -> its message; the one place that parses one.

protobuf raises its own errors, of two classes for its two implementations, and takes an empty
file for an empty model. The weights in files beside are looked at by ``external_files``.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.errors import GraphError, MtlExportError

if TYPE_CHECKING:
    import onnx


def read_onnx(path: Path, *, error: type[MtlExportError] = GraphError) -> onnx.ModelProto:
    """Return the model in the file ``path``, its external data unread.

    Raises:
        MtlExportError: Of class ``error``: it is missing, cut short or no ONNX file.
    """
    import onnx

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _unreadable(path, "not an ONNX file (no regular file)", error)
        model = onnx.load_model_from_string(path.read_bytes())
        _check_texts(model)
    except OSError as problem:
        found = f"not an ONNX file ({problem.strerror or problem})"
        raise _unreadable(path, found, error) from problem
    except MtlExportError:
        raise
    except Exception as problem:
        found = f"truncated, or not an ONNX file ({problem})"
        raise _unreadable(path, found, error) from problem
    if not model.graph.node:
        raise _unreadable(path, "it holds no graph", error)
    return model


def _check_texts(model: onnx.ModelProto) -> None:
    """Check that every text of a model is UTF-8: protobuf gives bytes where one is not.

    Raises:
        ValueError: One is not.
    """
    pending: list[Any] = [model]
    while pending:
        message = pending.pop()
        texts: list[Any] = []
        if message.DESCRIPTOR.name == "TensorProto":
            # Not all of its fields: listing them would copy the values.
            texts = [message.name]
            pending += message.external_data
        else:
            for field, value in message.ListFields():
                values = value if hasattr(value, "extend") else [value]
                if field.message_type:
                    pending += values
                elif field.type == field.TYPE_STRING:
                    texts += values
        wrong = next((text for text in texts if isinstance(text, bytes)), None)
        if wrong is not None:
            raise ValueError(f"{wrong[:40]!r} is no UTF-8")


def _unreadable(path: Path, found: str, error: type[MtlExportError]) -> MtlExportError:
    return error(
        f"{path}: {found}", expected="a whole ONNX model", fix="Write it again with mtl-export onnx"
    )
