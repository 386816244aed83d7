"""ONNX files in ONNX Runtime: sessions for those who serve, a runner for those who compare.

Of this package it imports nothing that needs more than numpy and onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task, tasks_of
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.errors import BackendMissingError, EngineRunError, UsageError, shortened
from mtl_export.names import TASK_IDS, TASKS_KEY
from mtl_export.runtime.arguments import whole_number
from mtl_export.runtime.runners.task_batches import by_task

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What people say -> what ONNX Runtime says; any other name is taken as its own.
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
EXTRA = "pip install 'mtl-export[cpu]'"
# The two packages put their files into the same folder.
EXTRA_CUDA = "pip uninstall -y onnxruntime, then pip install 'mtl-export[gpu]'"


def open_session(
    path: Path, *, providers: str | Sequence[str] | None = None, threads: int = 0
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on exactly the providers asked for.

    Args:
        path: An ONNX file, its external data beside it.
        providers: ``cpu``, ``cuda``, or ONNX Runtime's own names, the best first; one name
            alone, too; None: cpu. What a provider cannot compute, the CPU does.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.

    Raises:
        UsageError: ``providers`` holds something else than names, or ``threads`` is no whole
            number of at least 0.
        BackendMissingError: onnxruntime is not installed, or lacks a provider or its device.
        EngineRunError: onnxruntime refuses the file.
    """
    onnxruntime = load_onnxruntime()
    wanted = _provider_names(providers)
    there = onnxruntime.get_available_providers()
    absent = [name for name in wanted if name not in there]
    if absent:
        found = f"{', '.join(absent)} not in this build, which has {', '.join(there)}"
        raise _no_provider(found, absent)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _thread_count(threads)
    options.log_severity_level = 3  # errors only: warnings about constant folding are no news
    names = list(dict.fromkeys([*wanted, CPU]))

    def opened() -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=names, enable_fallback=0)

    try:
        try:
            session = opened()
        except Exception as error:
            if "float8" not in str(error):
                raise
            # It puts 8-bit floats into kernels for 8-bit integers, and then refuses its own
            # graph (1.31): without that fusion Q and DQ round, and products are in float.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            session = opened()
    except Exception as error:  # its exception types are made by pybind and share no base
        if type(error).__name__ == "NotImplemented":
            raise _no_kernel(path, names, error) from error
        raise _refused(path, "onnxruntime cannot open it", error) from error
    # A provider whose libraries or device are missing is left out without an exception.
    lost = [name for name in wanted if name not in session.get_providers()]
    if lost:
        found = f"{', '.join(lost)} could not be started; its device or libraries are missing"
        raise _no_provider(found, lost)
    return session


def _provider_names(providers: str | Sequence[str] | None) -> list[str]:
    """Return ONNX Runtime's names of what callers ask for."""
    asked = [providers] if isinstance(providers, str) else list(providers or (CPU,))
    others = [name for name in asked if not isinstance(name, str)]
    if others:
        raise UsageError(
            f"providers: {others[0]!r}",
            expected=(
                f"names: {', '.join(PROVIDERS)} or ONNX Runtime's own, because sessions are opened "
                "without options of providers"
            ),
            fix='Pass names, such as providers=["cuda"]',
        )
    return [PROVIDERS.get(name.lower(), name) for name in asked]


def _thread_count(threads: object) -> int:
    count = whole_number(threads)
    if count is None or count < 0:
        raise UsageError(
            f"threads: {threads!r}",
            expected="a whole number, 0 or more",
            fix="Pass another number; 0 lets ONNX Runtime decide",
        )
    return count


def load_onnxruntime() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        BackendMissingError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            "onnxruntime: not installed", expected="the package that runs ONNX files", fix=EXTRA
        ) from error
    return onnxruntime


class OrtRunner:
    """One ONNX file.

    Args:
        path: ``model.onnx``, its external data beside it.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
        providers: As for ``open_session``.
    """

    def __init__(
        self, path: Path, *, threads: int = 0, providers: str | Sequence[str] | None = None
    ) -> None:
        self.name = "onnxruntime"
        self._path = path
        self._threads, self._providers = threads, providers
        self._session: Any = None

    def __enter__(self) -> OrtRunner:
        """Open a session.

        Raises:
            BackendMissingError: onnxruntime is not installed.
            EngineRunError: onnxruntime refuses the file.
        """
        self._session = open_session(self._path, providers=self._providers, threads=self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self._session = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs."""
        return tuple(value.name for value in self._session.get_inputs())

    @property
    def _takes_one_task(self) -> bool:
        return any(v.name == TASK_IDS and v.shape == [1] for v in self._session.get_inputs())

    @property
    def metadata(self) -> dict[str, str]:
        """Return the file's ``metadata_props``."""
        return metadata_of(self._session)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, floating ones as float64.

        A graph that takes one task for the whole batch is run once for each task in it.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        ids = inputs.get(TASK_IDS)
        if ids is not None and ids.size > 1 and self._takes_one_task:
            return by_task(inputs, self.infer)
        values = run_session(self._session, self._path, inputs)
        return {
            name: value.astype(np.float64) if value.dtype.kind == "f" else value
            for name, value in values.items()
        }


class OrtPart:
    """A graph of a language model; its cache stays where it was computed, on GPUs too.

    Outputs called ``present.…`` come back as ``OrtValue``, all others as arrays.

    Args:
        session: What ``open_session`` returned.
        path: Its file, for messages.
        adapter: ``onnx_adapters.ActiveAdapter`` that the graph is run under; None: none.
    """

    def __init__(self, session: Any, path: Path, adapter: Any = None) -> None:
        self._session, self._path, self._adapter = session, path, adapter
        self._outputs = [value.name for value in session.get_outputs()]
        # One task for the whole batch: [] or [1], where callers pass every row's, [batch].
        self._single = {
            value.name: tuple(value.shape)
            for value in session.get_inputs()
            if value.name == "task_ids" and list(value.shape) in ([], [1])
        }
        self._device = "cuda" if CUDA in session.get_providers() else "cpu"

    def __call__(self, inputs: Mapping[str, Any], /) -> dict[str, Any]:
        """Return the outputs by name.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        given = {
            name: value[:1].reshape(self._single[name]) if name in self._single else value
            for name, value in inputs.items()
        }
        try:
            values = self._bound(given) if self._adapter is None else self._adapted(given)
        except Exception as error:
            raise not_run(self._session, self._path, error) from error
        return {
            name: value if name.startswith("present.") else value.numpy()
            for name, value in zip(self._outputs, values, strict=True)
        }

    def _bound(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Run with outputs bound to where they are wanted."""
        binding = self._session.io_binding()
        held = []  # the arrays must outlive the run
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                # ascontiguousarray would make [1] of [].
                held.append(np.require(value, requirements="C"))
                binding.bind_cpu_input(name, held[-1])
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device if name.startswith("present.") else "cpu")
        self._session.run_with_iobinding(binding)
        values: list[Any] = binding.get_outputs()
        return values

    def _adapted(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Run without bindings: ONNX Runtime (1.31) ignores adapters beside them."""
        onnxruntime = load_onnxruntime()
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.require(value, requirements="C"))
            if isinstance(value, np.ndarray)
            else value
            for name, value in inputs.items()
        }
        values: list[Any] = self._session.run_with_ort_values(
            self._outputs, feeds, self._adapter.options
        )
        return values


def run_session(
    session: Any,
    path: Path,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    options: Any = None,
) -> dict[str, Array]:
    """Return a session's outputs by name, in the graph's dtypes.

    Args:
        session: What ``open_session`` returned.
        path: Its file, for messages.
        inputs: By name.
        outputs: Which to return; None: all.
        options: ``onnxruntime.RunOptions``, or None.

    Raises:
        EngineRunError: An input is missing, unknown or misshaped, or a node failed.
    """
    names = list(outputs or [value.name for value in session.get_outputs()])
    try:
        values = session.run(names, dict(inputs), options)
    except Exception as error:
        raise not_run(session, path, error) from error
    return dict(zip(names, values, strict=True))


def metadata_of(session: Any) -> dict[str, str]:
    """Return ``metadata_props`` of a session's file."""
    return dict(session.get_modelmeta().custom_metadata_map)


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return ``metadata_props`` of an ONNX file; its weights are not read.

    Raises:
        EngineRunError: The file is no ONNX model.
    """
    model = read_onnx(path, error=EngineRunError)
    return {entry.key: entry.value for entry in model.metadata_props}


def task_table(metadata: Mapping[str, str]) -> tuple[Task, ...]:
    """Return the tasks that the file says it serves, none if it says nothing.

    Raises:
        CheckpointError: What it says is no table of tasks.
    """
    return tasks_of(metadata.get(TASKS_KEY, "[]"), TASKS_KEY)


def not_run(session: Any, path: Path, error: Exception) -> EngineRunError:
    """Return our error for what a session's run raised."""
    inputs = (f"{value.name} {value.type} {list(value.shape)}" for value in session.get_inputs())
    return EngineRunError(
        f"{path}: onnxruntime cannot run it ({_reason(error)})",
        expected=f"inputs {shortened(inputs, 8)}",
        fix=(
            "Give exactly these, with ids inside the vocabulary and rows no longer than the "
            "model's positions"
        ),
    )


def _refused(path: Path, found: str, error: Exception) -> EngineRunError:
    return EngineRunError(
        f"{path}: {found} ({_reason(error)})",
        expected="a whole ONNX file with its external data beside it",
        fix="Export it again with --force",
    )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _no_kernel(path: Path, providers: Sequence[str], error: Exception) -> BackendMissingError:
    return BackendMissingError(
        f"{path}: {', '.join(providers)} cannot compute in its types ({_reason(error)})",
        expected=(
            "a provider with kernels for them, because the CPU provider has hardly any for bfloat16"
        ),
        fix="Run it on a GPU, or export with --dtype fp32 or fp16",
    )


def _no_provider(found: str, names: Sequence[str]) -> BackendMissingError:
    is_cuda = CUDA in names
    return BackendMissingError(
        f"onnxruntime: {found}",
        expected=", ".join(names),
        fix=f"With an NVIDIA GPU: {EXTRA_CUDA}" if is_cuda else "Install a build that has it",
    )
