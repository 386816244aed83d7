"""An ONNX graph and one task's rows -> what every activation looks like, in ONNX Runtime.

The activations become outputs of the graph, a group of them at a time, so that a group of
one batch fits into ``GROUP_BYTES``; of every batch only histograms and a few rows are kept.
Memory does not grow with the rows, and no weight is held here. Padding is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import MASK, Samples
from mtl_export.errors import BackendMissingError, CalibrationError
from mtl_export.names import TASK_IDS
from mtl_export.runtime.ort import CPU, EXTRA
from mtl_export_calibration.calibrators import CALIBRATORS
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import Histogram
from mtl_export_calibration.layers import QuantLayer

GROUP_BYTES = 256 << 20
BATCH = 16
# Rows of each activation that are kept to measure what quantising its layer costs.
KEPT_ROWS = 64


@dataclass
class TensorStatistics:
    """What one activation looks like on one task.

    Attributes:
        histogram: Its magnitudes.
        rows: Some of its rows, float32 ``[K, I]``, evenly spread over the batches.
    """

    histogram: Histogram = field(default_factory=Histogram)
    rows: list[Array] = field(default_factory=list)

    def add(self, values: Array, keep: int) -> None:
        """Count ``values`` ``[N, I]`` and keep ``keep`` rows."""
        values = values.astype(np.float32, copy=False)
        self.histogram.add(values)
        if keep > 0 and len(values):
            places = np.linspace(0, len(values) - 1, min(keep, len(values))).astype(np.int64)
            self.rows.append(values[places])

    def compute_amax(self, method: str, number: NumberFormat) -> float:
        """Return the magnitude to keep.

        Args:
            method: A key of ``CALIBRATORS``.
            number: The activation's format.
        """
        return CALIBRATORS[method](self.histogram, number)


def collect(
    path: Path,
    layers: Sequence[QuantLayer],
    samples: Samples,
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    begin: Callable[[], TensorStatistics] = TensorStatistics,
    kept_rows: int = KEPT_ROWS,
) -> dict[str, TensorStatistics]:
    """Return the statistics of every layer's activation, by its name.

    Args:
        path: The graph, float, its external data beside it.
        layers: Whose activations.
        samples: The rows of one task.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
        progress: Is told how many of how many batches are done.
        begin: Returns what counts one activation's values.
        kept_rows: Rows of each activation to keep, or a few more.

    Raises:
        BackendMissingError: onnxruntime is not installed.
        CalibrationError: The graph cannot be run on the data, or an activation is not finite.
    """
    batches = -(-len(samples) // BATCH)
    groups = list(_groups(layers, samples))
    keep = -(-kept_rows // max(1, batches))
    found: dict[str, TensorStatistics] = {}
    done = 0
    for group in groups:
        statistics = {name: begin() for name in group}
        with_outputs = _Session(path, group, threads)
        for batch in samples.batches(BATCH):
            mask = batch.arrays.get(MASK)
            for name, value in zip(group, with_outputs.run(batch), strict=True):
                if not np.isfinite(value).all():
                    raise _not_finite(path, name)
                statistics[name].add(_valid_rows(value, mask), keep)
            done += 1
            progress(done, batches * len(groups))
        found |= statistics
    return found


def _groups(layers: Sequence[QuantLayer], samples: Samples) -> Iterator[list[str]]:
    """Yield names of activations whose values on one batch fit into ``GROUP_BYTES``."""
    mask = samples.arrays.get(MASK)
    positions = min(BATCH, len(samples)) * (mask.shape[1] if mask is not None else 1)
    sizes: dict[str, int] = {}
    for layer in layers:
        # How large an image's activation is, only running it tells: one at a time.
        size = positions * layer.shape[0] * 4 if layer.op_type == "MatMul" else GROUP_BYTES
        sizes[layer.x] = max(size, sizes.get(layer.x, 0))
    group: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if group and taken + size > GROUP_BYTES:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def _valid_rows(value: Array, mask: Array | None) -> Array:
    """Return the activation as rows, without those of padding."""
    if mask is not None and value.shape[: mask.ndim] == mask.shape:
        value = value[mask != 0]
    rows: Array = value.reshape(-1, value.shape[-1])
    return rows


class _Session:
    """A graph whose activations are its outputs."""

    def __init__(self, path: Path, outputs: Sequence[str], threads: int) -> None:
        self._path, self._outputs = path, list(outputs)
        self._session = _open(path, outputs, threads)
        self._inputs = {value.name for value in self._session.get_inputs()}

    def run(self, batch: Samples) -> list[Array]:
        """Return the activations on one batch."""
        feed = {**batch.arrays, TASK_IDS: batch.task_ids}
        missing = sorted(self._inputs - feed.keys())
        if missing:
            raise CalibrationError(
                f"calibration data: no array for the input {missing[0]} of {self._path}",
                expected=f"arrays {', '.join(sorted(self._inputs))}",
                fix="Add it to the data",
            )
        try:
            values: list[Array] = self._session.run(
                self._outputs, {name: feed[name] for name in self._inputs}
            )
        except Exception as error:  # its exception types are made by pybind and share no base
            raise CalibrationError(
                f"{self._path}: onnxruntime cannot run it on the data ({_first_line(error)})",
                expected="arrays of the graph's own shapes and types",
                fix="Correct the data, or export the graph again with --force",
            ) from error
        return values


def _open(path: Path, outputs: Sequence[str], threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            "onnxruntime: not installed", expected="the package that runs ONNX files", fix=EXTRA
        ) from error
    import onnx

    # From memory: nothing is written beside the graph, and its weights stay in their file.
    model = read_onnx(path)
    existing = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in outputs if name not in existing
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
    )
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception as error:
        raise CalibrationError(
            f"{path}: onnxruntime cannot open it ({_first_line(error)})",
            expected="a whole ONNX file with its external data beside it",
            fix="Export it again with --force",
        ) from error


def _not_finite(path: Path, name: str) -> CalibrationError:
    return CalibrationError(
        f"{path}: NaN or Inf in {name}",
        expected="finite activations, because no range can be given to them",
        fix="Check the data, and that mtl-export parity passes",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
