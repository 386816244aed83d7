"""ONNX files in ONNX Runtime, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, EngineRunError

CPU = "CPUExecutionProvider"
EXTRA = "pip install 'mtl-export[cpu]'"


class OrtRunner:
    """One ONNX file.

    Args:
        path: ``model.onnx``, its external data beside it.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self.name = "onnxruntime"
        self._path = path
        self._threads = threads
        self._session: Any = None

    def __enter__(self) -> OrtRunner:
        """Open a session.

        Raises:
            BackendMissingError: onnxruntime is not installed.
            EngineRunError: onnxruntime refuses the file.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendMissingError(
                where="onnxruntime",
                found="not installed",
                expected="the package that runs ONNX files",
                fix=EXTRA,
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors only: warnings about constant folding are no news
        try:
            self._session = onnxruntime.InferenceSession(str(self._path), options, providers=[CPU])
        except Exception as error:  # its exception types are made by pybind and share no base
            raise _refused(self._path, "onnxruntime cannot open it", error) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self._session = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs."""
        return tuple(value.name for value in self._session.get_inputs())

    @property
    def metadata(self) -> dict[str, str]:
        """Return the file's ``metadata_props``."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, floating ones as float64.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        try:
            values = self._session.run(None, dict(inputs))
        except Exception as error:
            raise _refused(self._path, "onnxruntime cannot run it", error) from error
        names = [value.name for value in self._session.get_outputs()]
        return {
            name: value.astype(np.float64) if value.dtype.kind == "f" else value
            for name, value in zip(names, values, strict=True)
        }


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return ``metadata_props`` of an ONNX file; its weights are not read.

    Raises:
        EngineRunError: The file is no ONNX model.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise _refused(path, "not an ONNX file", error) from error
    return {entry.key: entry.value for entry in model.metadata_props}


def task_table(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the tasks that the file says it serves, empty if it says nothing."""
    table: list[dict[str, Any]] = json.loads(metadata.get("mtl_export.tasks", "[]"))
    return table


def _refused(path: Path, found: str, error: Exception) -> EngineRunError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EngineRunError(
        where=str(path),
        found=f"{found} ({reason})",
        expected="a whole ONNX file with its external data beside it",
        fix="Export it again with --force",
    )
