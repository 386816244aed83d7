"""TensorRT's Python package -> a loaded library with one log and a declared surface.

The backend is written against what ``tensorrt`` 10.13 to 11.x and
``tensorrt_rtx`` 1.x share. ``API`` lists every attribute of theirs that it
touches; two checks keep that list true:

    source == API    the backend's syntax tree is compared with the table, so
                     neither can gain or lose an attribute alone
    API in wheels    the names in the real binding wheels, kept beside the tests
                     and proved against them, hold each one

For the first check to see through the code, a TensorRT object is only ever held
in a variable (or attribute) whose name is in ``HANDLES``, and those names hold
nothing else that is looked into.

Traps this file deals with:
    - TensorRT keeps the first logger of the process and ignores later ones, so
      there is one ``Log`` per library, for ever.
    - Many calls never raise: they log and return None, -1 or False. ``Log.collect``
      gathers what was logged while a block ran, so that the caller can fail.
    - Without a driver each error is followed by a second one about cudaError 35,
      which says nothing about the first and is dropped.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

# A TensorRT object: its classes have no type stubs for the versions supported here.
TrtObject: TypeAlias = Any

# class -> attribute -> the class that the attribute is, or returns ("" for plain values).
# "" is the module itself.
API: Mapping[str, Mapping[str, str]] = {
    "": {
        "__version__": "",
        "Builder": "Builder",
        "BuilderFlag": "BuilderFlag",
        "ComputeCapability": "ComputeCapability",
        "HardwareCompatibilityLevel": "HardwareCompatibilityLevel",
        "ILogger": "ILogger",
        "IProgressMonitor": "IProgressMonitor",
        "IStreamWriter": "IStreamWriter",
        "MemoryPoolType": "MemoryPoolType",
        "NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
        "OnnxParser": "OnnxParser",
        "OnnxParserRefitter": "OnnxParserRefitter",
        "Refitter": "Refitter",
        "Runtime": "Runtime",
        "SerializationFlag": "SerializationFlag",
        "TensorIOMode": "TensorIOMode",
        "Weights": "Weights",
    },
    "Builder": {
        "build_serialized_network": "",
        "build_serialized_network_to_stream": "",
        "create_builder_config": "IBuilderConfig",
        "create_network": "INetworkDefinition",
        "create_optimization_profile": "IOptimizationProfile",
    },
    "BuilderFlag": {"REFIT_INDIVIDUAL": "", "STRIP_PLAN": "", "TF32": "", "VERSION_COMPATIBLE": ""},
    "ComputeCapability": {"__members__": ""},
    "DataType": {"name": ""},
    "HardwareCompatibilityLevel": {"AMPERE_PLUS": "", "SAME_COMPUTE_CAPABILITY": ""},
    "IBuilderConfig": {
        "add_optimization_profile": "",
        "builder_optimization_level": "",
        "clear_flag": "",
        "create_timing_cache": "ITimingCache",
        "get_flag": "",
        "get_memory_pool_limit": "",
        "get_timing_cache": "ITimingCache",
        "hardware_compatibility_level": "",
        "num_compute_capabilities": "",
        "progress_monitor": "",
        "set_compute_capability": "",
        "set_flag": "",
        "set_memory_pool_limit": "",
        "set_timing_cache": "",
    },
    "ICudaEngine": {
        "create_execution_context": "IExecutionContext",
        "create_serialization_config": "ISerializationConfig",
        "get_tensor_dtype": "DataType",
        "get_tensor_mode": "",
        "get_tensor_name": "",
        "num_io_tensors": "",
        "num_optimization_profiles": "",
        "serialize_with_config": "",
    },
    "IExecutionContext": {
        "execute_async_v3": "",
        "get_tensor_shape": "",
        "set_input_shape": "",
        "set_optimization_profile_async": "",
        "set_tensor_address": "",
    },
    "ILayer": {"get_output": "ITensor", "num_outputs": ""},
    "ILogger": {
        "ERROR": "",
        "INFO": "",
        "INTERNAL_ERROR": "",
        "VERBOSE": "",
        "WARNING": "",
        "log": "",
    },
    "INetworkDefinition": {
        "get_input": "ITensor",
        "get_layer": "ILayer",
        "get_output": "ITensor",
        "mark_weights_refittable": "",
        "name": "",
        "num_inputs": "",
        "num_layers": "",
        "num_outputs": "",
    },
    "IOptimizationProfile": {"set_shape": ""},
    "IProgressMonitor": {"phase_finish": "", "phase_start": "", "step_complete": ""},
    "ISerializationConfig": {"clear_flag": "", "set_flag": ""},
    "IStreamWriter": {"write": ""},
    "ITensor": {"dtype": "DataType", "name": "", "shape": ""},
    "ITimingCache": {"combine": "", "serialize": ""},
    "MemoryPoolType": {"WORKSPACE": ""},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": ""},
    "OnnxParser": {
        "get_error": "ParserError",
        "load_initializer": "",
        "load_model_proto": "",
        "num_errors": "",
        "parse_from_file": "",
        "parse_model_proto": "",
    },
    "OnnxParserRefitter": {"refit_from_file": ""},
    "ParserError": {"desc": "", "local_function_stack": "", "node_name": "", "node_operator": ""},
    "Refitter": {
        "get_all_weights": "",
        "get_missing_weights": "",
        "get_weights_prototype": "Weights",
        "refit_cuda_engine": "",
        "set_named_weights": "",
    },
    "Runtime": {"deserialize_cuda_engine": "ICudaEngine"},
    "SerializationFlag": {"EXCLUDE_WEIGHTS": "", "INCLUDE_REFIT": ""},
    "TensorIOMode": {"INPUT": ""},
    "Weights": {"dtype": "DataType", "size": ""},
}

# "Class.attribute" that not every supported version has -> the one whose ``hasattr``
# decides, in the backend, whether it is used.
OPTIONAL: Mapping[str, str] = {
    ".ComputeCapability": ".ComputeCapability",
    "Builder.build_serialized_network_to_stream": "Builder.build_serialized_network_to_stream",
    "ComputeCapability.__members__": ".ComputeCapability",
    "IBuilderConfig.num_compute_capabilities": ".ComputeCapability",
    "IBuilderConfig.set_compute_capability": ".ComputeCapability",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.load_initializer": "OnnxParser.load_model_proto",
    "OnnxParser.load_model_proto": "OnnxParser.load_model_proto",
    "OnnxParser.parse_model_proto": "OnnxParser.load_model_proto",
    "SerializationFlag.INCLUDE_REFIT": "SerializationFlag.INCLUDE_REFIT",
}

# variable or attribute name -> the class of what it holds.
HANDLES: Mapping[str, str] = {
    "trt": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "data_type": "DataType",
    "engine": "ICudaEngine",
    "layer": "ILayer",
    "new_weights": "Weights",
    "network": "INetworkDefinition",
    "optimization_profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "parser_refitter": "OnnxParserRefitter",
    "prototype": "Weights",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "serialization": "ISerializationConfig",
    "timings": "ITimingCache",
    "trt_tensor": "ITensor",
}

FULL = "tensorrt"
RTX = "tensorrt_rtx"
NAMES = (FULL, RTX)

_LOGGER = logging.getLogger(__name__)


class Log:
    """What one TensorRT library says in this process.

    Attributes:
        handle: The object that TensorRT's constructors take.
    """

    def __init__(self, trt: ModuleType) -> None:
        self._errors: list[str] = []
        # One build or run at a time: messages carry no mark of the call they belong to.
        self._lock = threading.RLock()
        self.handle: TrtObject = _logger(trt, self._receive)

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Yield a list that fills with the errors logged while the block runs."""
        with self._lock:
            outer, self._errors = self._errors, []
            try:
                yield self._errors
            finally:
                self._errors = outer

    def _receive(self, level: int, message: str) -> None:
        if level < logging.ERROR:
            _LOGGER.log(level, "%s", message)
        elif not self._is_echo(message):
            self._errors.append(message)
            # The error becomes an exception with context; the bare line is for -vv.
            _LOGGER.debug("%s", message)

    def _is_echo(self, message: str) -> bool:
        return bool(self._errors) and (
            "checkMacros.cpp::catchCudaError" in message or message == self._errors[-1]
        )


def _logger(trt: ModuleType, receive: Callable[[int, str], None]) -> TrtObject:
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        # Its warnings are about int64 bindings and the like: nothing a user can act on.
        trt.ILogger.WARNING: logging.INFO,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.NOTSET,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: TrtObject, message: str) -> None:
            level = levels.get(severity, logging.ERROR)
            if level > logging.NOTSET:
                receive(level, message)

    return Logger()


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        trt: The module.
        log: Its only logger.
    """

    name: str
    trt: ModuleType
    log: Log

    @property
    def version(self) -> str:
        """Return its version, such as ``1.7.1.116``."""
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        """Return whether engines are built for named GPUs rather than for the one at hand."""
        return hasattr(self.trt, "ComputeCapability")


_LOGS: dict[str, Log] = {}
_LOGS_LOCK = threading.Lock()


def load_library(name: str) -> Library:
    """Return the TensorRT library ``name``, imported once.

    Raises:
        ImportError: It is not installed, or its shared libraries cannot be loaded.
    """
    trt = importlib.import_module(name)
    with _LOGS_LOCK:
        if name not in _LOGS:
            _LOGS[name] = Log(trt)
    return Library(name=name, trt=trt, log=_LOGS[name])
