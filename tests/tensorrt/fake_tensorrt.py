"""A stand-in for TensorRT with a GPU: its calls, its silence, and plans that can be refitted.

It has what the backend takes from the library, under the same names and with the same
manners: calls that cannot do what they are asked log and return False or None. An engine
is the ONNX model with its weights, so that its answers are onnx's own. ``Faults`` plants
what the backend must not miss.
"""

# ruff: noqa: D102 - the methods are TensorRT's, and documented there

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator

from mtl_export.tensorrt import build, refit, restore
from mtl_export.tensorrt.api import Library, Log
from mtl_export.tensorrt.available import BuilderInfo
from mtl_export.tensorrt.manifest import EngineManifest
from mtl_export.tensorrt.refit import sample_inputs

DTYPES: Mapping[int, str] = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.INT64: "INT64"}
GPU = b"gpu-0 "


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        ignored: Flags that ``set_flag`` logs about and does not set.
        folded: Weights that the builder makes unchangeable.
        fused: Weight -> others that must be given with it.
        deaf: Weights whose new values are taken and not used.
        unnamed: A weight that the engine asks for and the graph does not have.
        residue: Added to a weight with every refit.
        loses: A bias that refittable engines count as 0.
        fails: Calls that log and return nothing.
    """

    ignored: set[str] = field(default_factory=set)
    folded: set[str] = field(default_factory=set)
    fused: dict[str, set[str]] = field(default_factory=dict)
    deaf: set[str] = field(default_factory=set)
    unnamed: str = ""
    residue: str = ""
    loses: str = ""
    fails: set[str] = field(default_factory=set)


class ILogger:
    """The base of the backend's logger."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


def enum_of(name: str, *members: str) -> Any:
    """Return an enum whose members have these names."""
    return Enum(name, members)


class FakeTensorRT(SimpleNamespace):
    """The module ``tensorrt``.

    Attributes:
        faults: What goes wrong.
        given: What the last build was configured with.
        timed: Kernels that the last build had to time.
    """

    def __init__(self, version: str = "11.4.0.106") -> None:
        super().__init__(__version__=version, faults=Faults(), given={}, timed=0)
        self.ILogger = ILogger
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.IStreamWriter = type("IStreamWriter", (), {})
        self.BuilderFlag = enum_of(
            "BuilderFlag", "REFIT_INDIVIDUAL", "STRIP_PLAN", "TF32", "VERSION_COMPATIBLE"
        )
        self.DataType = enum_of("DataType", "FLOAT", "INT64")
        self.HardwareCompatibilityLevel = enum_of(
            "HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"
        )
        self.MemoryPoolType = enum_of("MemoryPoolType", "WORKSPACE")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.SerializationFlag = enum_of("SerializationFlag", "EXCLUDE_WEIGHTS", "INCLUDE_REFIT")
        self.Builder: Callable[[Any], FakeBuilder] = lambda logger: FakeBuilder(self, logger)
        self.OnnxParser = FakeParser
        self.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: FakeEngine(self, logger, plan)
        )
        self.Refitter = FakeRefitter
        self.OnnxParserRefitter = FakeParserRefitter

    def failed(self, logger: Any, call: str) -> bool:
        """Return whether ``call`` is to fail, after it has logged."""
        if call in self.faults.fails:
            logger.log(ILogger.ERROR, f"{call} is out of order")
        return call in self.faults.fails


class FakeConfig:
    """``IBuilderConfig``."""

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.flags = {trt.BuilderFlag.TF32}
        self.pools: dict[Any, int] = {}
        self.profiles: list[Any] = []
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None
        self.timings: FakeTimings | None = None

    def set_flag(self, flag: Any) -> None:
        if flag.name in self._trt.faults.ignored:
            self._logger.log(ILogger.ERROR, f"{flag.name} is not available")
        else:
            self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self.flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self.pools[pool]

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> FakeTimings:
        return FakeTimings(self._logger, data)

    def set_timing_cache(self, timings: FakeTimings, ignore_mismatch: bool) -> bool:
        if not timings.is_ours and not ignore_mismatch:
            self._logger.log(ILogger.ERROR, "timing cache of another device")
            return False
        self.timings = timings
        return True

    def get_timing_cache(self) -> FakeTimings | None:
        return self.timings


class FakeTimings:
    """``ITimingCache``: a GPU's mark and the kernels timed."""

    def __init__(self, logger: Any, data: bytes) -> None:
        self._logger = logger
        self.is_ours = not data or data.startswith(GPU)
        self.kernels = set(data.removeprefix(GPU).split())

    def combine(self, other: FakeTimings, ignore_mismatch: bool) -> bool:
        if not other.is_ours:
            self._logger.log(ILogger.ERROR, "timing cache of another device")
            return False
        self.kernels |= other.kernels
        return True

    def serialize(self) -> bytes:
        return GPU + b" ".join(sorted(self.kernels))


class FakeTensor:
    """``ITensor`` of a graph's input or output."""

    def __init__(self, trt: FakeTensorRT, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.dtype = trt.DataType[DTYPES[value.type.tensor_type.elem_type]]
        self.shape = [
            dim.dim_value if dim.HasField("dim_value") else -1
            for dim in value.type.tensor_type.shape.dim
        ]


class FakeNetwork:
    """``INetworkDefinition``: the model, and which weights may change."""

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger, self.name = trt, logger, ""
        self.model = onnx.ModelProto()
        self.marked: set[str] = set()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    @property
    def num_layers(self) -> int:
        return 1

    def get_input(self, index: int) -> FakeTensor:
        return FakeTensor(self.trt, self.model.graph.input[index])

    def get_output(self, index: int) -> FakeTensor:
        return FakeTensor(self.trt, self.model.graph.output[index])

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(num_outputs=1, get_output=self.get_output)

    def mark_weights_refittable(self, name: str) -> bool:
        if name not in {tensor.name for tensor in self.model.graph.initializer}:
            self.logger.log(ILogger.ERROR, f"no weights are called {name}")
            return False
        self.marked.add(name)
        return True


class FakeParser:
    """``OnnxParser`` of a release that reads files only."""

    num_errors = 0

    def __init__(self, network: FakeNetwork, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        load_external_data_for_model(model, str(Path(path).parent))
        self._network.model.CopyFrom(model)
        return True


class FakeBuilder:
    """``Builder``."""

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> FakeNetwork:
        return FakeNetwork(self._trt, self._logger)

    def create_builder_config(self) -> FakeConfig:
        return FakeConfig(self._trt, self._logger)

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda *shapes: None)

    def build_serialized_network_to_stream(
        self, network: FakeNetwork, config: FakeConfig, writer: Any
    ) -> bool:
        if self._trt.failed(self._logger, "build_serialized_network_to_stream"):
            return False
        model, flags = onnx.ModelProto(), {flag.name for flag in config.flags}
        model.CopyFrom(network.model)
        changing = network.marked - self._trt.faults.folded
        if "REFIT_INDIVIDUAL" in flags:
            for tensor in model.graph.initializer:
                if tensor.name == self._trt.faults.loses:
                    tensor.raw_data = bytes(len(tensor.raw_data))
        if "STRIP_PLAN" in flags:
            changing = {tensor.name for tensor in model.graph.initializer}
            for tensor in model.graph.initializer:
                tensor.raw_data = bytes(len(tensor.raw_data))
        kernels = {node.op_type.encode() for node in model.graph.node}
        timed = config.timings.kernels if config.timings else set()
        self._trt.timed = len(kernels - timed)
        timed |= kernels
        self._trt.given = {
            "flags": flags,
            "level": config.builder_optimization_level,
            "hardware": config.hardware_compatibility_level.name,
            "pools": {pool.name: size for pool, size in config.pools.items()},
            "profiles": len(config.profiles),
        }
        head = json.dumps(sorted(changing)).encode() + b"\n"
        writer.write(head + model.SerializeToString())
        return True


class FakeEngine:
    """``ICudaEngine``: a model, and which of its weights may change."""

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: bytes) -> None:
        self.trt, self._logger = trt, logger
        head, _, body = plan.partition(b"\n")
        self.changing: list[str] = json.loads(head)
        self.model = onnx.ModelProto.FromString(body)
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def create_serialization_config(self) -> Any:
        flags = {self.trt.SerializationFlag.EXCLUDE_WEIGHTS}
        return SimpleNamespace(flags=flags, clear_flag=flags.discard, set_flag=flags.add)

    def serialize_with_config(self, serialization: Any) -> bytes | None:
        if self.trt.failed(self._logger, "serialize_with_config"):
            return None
        assert serialization.flags == {self.trt.SerializationFlag.INCLUDE_REFIT}
        return json.dumps(self.changing).encode() + b"\n" + bytes(self.model.SerializeToString())


class FakeRefitter:
    """``Refitter``."""

    def __init__(self, engine: FakeEngine, logger: Any) -> None:
        self._engine, self._logger, self._trt = engine, logger, engine.trt
        self._new: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return self._engine.changing

    def take(self, model: onnx.ModelProto) -> bool:
        """Give the weights of ``model`` that may change; return whether that was possible."""
        if self._trt.failed(self._logger, "refit_from_file"):
            return False
        wanted = set(self._engine.changing)
        wanted |= {one for name in wanted for one in self._trt.faults.fused.get(name, ())}
        self._new = {
            tensor.name: tensor.raw_data
            for tensor in model.graph.initializer
            if tensor.name in wanted
        }
        return True

    def get_missing_weights(self) -> list[str]:
        asked = {one for name in self._new for one in self._trt.faults.fused.get(name, ())}
        asked |= {self._trt.faults.unnamed} - {""}
        return sorted(asked - self._new.keys())

    def refit_cuda_engine(self) -> bool:
        if self._trt.failed(self._logger, "refit_cuda_engine") or self.get_missing_weights():
            return False
        for name, data in self._new.items():
            if name not in self._trt.faults.deaf:
                self._engine.weights[name].raw_data = data
            if name == self._trt.faults.residue:
                values = np.frombuffer(data, np.float32) + np.float32(0.01)
                self._engine.weights[name].raw_data = values.tobytes()
        return True


class FakeParserRefitter:
    """``OnnxParserRefitter``: gives a refitter the weights of an ONNX file."""

    def __init__(self, refitter: FakeRefitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        return self._refitter.take(onnx.load(path))


def fake_answers(library: Any, path: Path, manifest: EngineManifest) -> dict[str, Any]:
    """Return what the engine at ``path`` answers, by onnx's own evaluator."""
    engine = FakeEngine(library.trt, library.log.handle, path.read_bytes())
    return answers_of_model(engine.model, sample_inputs(manifest))


def answers_of_model(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's outputs by name."""
    names = [value.name for value in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, dict(inputs)), strict=True))


def install(monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT) -> Library:
    """Make the backend build with ``trt``, on a machine that seems to have a GPU."""
    library = Library("tensorrt", trt, Log(trt))  # type: ignore[arg-type]
    info = BuilderInfo("tensorrt", trt.__version__, gpu="9.0", reason="")
    for module in (build, refit, restore):
        monkeypatch.setattr(module, "load_library", lambda name: library)
        monkeypatch.setattr(module, "available_builder", lambda name=None: info)
    monkeypatch.setattr(refit, "answers_of", fake_answers)
    return library
