"""ONNX file -> engine file and its manifest.

One path for every TensorRT: strongly typed, so that precision is what the graph says;
TF32 off unless asked; parsed by path, so that external data is mapped and not copied;
streamed to the file, so that memory holds the weights once. The file appears under
its name only when it is whole.

Not done here: INT8 calibrators and FP16 switches. Quantised and half graphs are built as
they are. Weights that may change afterwards are marked here, and changed in refit.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from mtl_export.errors import EngineBuildError, OutputError
from mtl_export.tensorrt.api import Library, TrtObject, load_library
from mtl_export.tensorrt.available import BuilderInfo, available_builder
from mtl_export.tensorrt.callbacks import (
    FileSink,
    PhaseTracker,
    Progress,
    interrupts_kept,
    progress_monitor,
    stream_writer,
)
from mtl_export.tensorrt.describe import describe_engine
from mtl_export.tensorrt.manifest import EngineManifest
from mtl_export.tensorrt.network import precision_of, tensor_info
from mtl_export.tensorrt.options import BuildOptions, check_options, member_name
from mtl_export.tensorrt.shapes import Profile, check_profiles
from mtl_export.tensorrt.source import OnnxSource, TensorInfo, read_source
from mtl_export.tensorrt.timing_cache import load_timing_cache, save_timing_cache

# The same for every engine, so that engines of one structure share their graph part.
NETWORK_NAME = "mtl-export"

# Feeds a parser one graph; returns whether the parser took it.
Parse: TypeAlias = Callable[[TrtObject], bool]


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    profiles: Sequence[Profile],
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    tf32: bool = False,
    compute_capabilities: Sequence[str] = (),
    progress: Progress | None = None,
    library_name: str | None = None,
) -> EngineManifest:
    """Return the manifest of the engine built from ``onnx_path`` into ``engine_path``.

    The manifest is the caller's to write: ``manifest.write(manifest_path(engine_path))``.

    Args:
        onnx_path: The graph; its external data lies beside it.
        engine_path: The file to write; its folder is created.
        profiles: Shapes to accept (``default_profile``, or from ``parse_shapes``).
        workspace_bytes: Scratch memory that kernels may ask for.
        optimization_level: 0 to 5.
        tf32: Whether float32 products may be rounded to TF32.
        compute_capabilities: GPUs to build for, such as ``8.6`` (TensorRT-RTX only).
        progress: Called with the phase's name and the overall fraction; what it raises
            stops the build and is raised here.
        library_name: ``tensorrt`` or ``tensorrt_rtx`` instead of the better one here.

    Raises:
        BackendMissingError: No TensorRT can build here.
        UsageError: A profile or an option does not fit.
        EngineBuildError: The graph or the build was refused; every reason is named.
        OutputError: The engine cannot be written.
    """
    options = BuildOptions(
        profiles=tuple(profiles),
        workspace_bytes=workspace_bytes,
        optimization_level=optimization_level,
        tf32=tf32,
        compute_capabilities=tuple(compute_capabilities),
    )
    return build_with_options(
        onnx_path, engine_path, options=options, progress=progress, library_name=library_name
    )


def build_with_options(
    onnx_path: Path,
    engine_path: Path,
    *,
    options: BuildOptions,
    progress: Progress | None = None,
    library_name: str | None = None,
) -> EngineManifest:
    """Return what ``build_engine`` does, of choices that are a record already."""
    info = available_builder(library_name)
    return build_from(
        read_source(onnx_path),
        engine_path,
        info=info,
        options=options,
        parse=lambda parser: bool(parser.parse_from_file(str(onnx_path))),
        progress=progress,
    )


def build_from(
    source: OnnxSource,
    engine_path: Path,
    *,
    info: BuilderInfo,
    options: BuildOptions,
    parse: Parse,
    progress: Progress | None,
) -> EngineManifest:
    """Return the manifest of the engine built from what ``parse`` feeds the parser."""
    library = load_library(info.name)
    check_profiles(source, options.profiles)
    check_options(library, options)
    partial = engine_path.with_name(f".{engine_path.name}.part")
    tracker = PhaseTracker(progress)
    with library.log.collect() as errors, interrupts_kept(tracker):
        steps = _Steps(source, library, errors)
        builder, network, parser = steps.parse(parse)
        steps.compare_inputs_and_outputs(network)
        try:
            engine_path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                sink = FileSink(file)
                steps.write(builder, network, options, sink, tracker)
            manifest = describe_engine(
                partial,
                engine_name=engine_path.name,
                engine_sha256=sink.sha256,
                source=source,
                info=info,
                options=options,
                precision=precision_of(network),
            )
            os.replace(partial, engine_path)
        except OSError as error:
            if error is tracker.problem:
                raise
            raise OutputError(
                f"{engine_path}: the engine cannot be written ({error.strerror or error})",
                expected="a writable folder with room for about the size of the weights",
                fix="Choose another --output, or make room",
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink()
        # The network's weights live in the parser: it may go only now.
        del network, parser, builder
    return manifest


class _Steps:
    """One build's steps; each turns what TensorRT only logs into an error."""

    def __init__(self, source: OnnxSource, library: Library, errors: list[str]) -> None:
        self._source = source
        self._library = library
        self._errors = errors

    def parse(self, parse: Parse) -> tuple[TrtObject, TrtObject, TrtObject]:
        """Return the builder, the parsed network, and the parser that owns its weights."""
        trt, handle = self._library.trt, self._library.log.handle
        try:
            builder = trt.Builder(handle)
        except TypeError as error:
            # The bindings' way to say that the C++ factory gave nothing.
            raise self._refusal("no builder could be made") from error
        network = builder.create_network(_creation_flags(trt))
        network.name = NETWORK_NAME
        parser = trt.OnnxParser(network, handle)
        self._check("preparing the network")
        if not parse(parser):
            raise self._parse_refusal(parser)
        return builder, network, parser

    def compare_inputs_and_outputs(self, network: TrtObject) -> None:
        """Refuse a network whose inputs or outputs are not those of the graph."""
        inputs = {
            str(trt_tensor.name): tensor_info(trt_tensor)
            for trt_tensor in map(network.get_input, range(network.num_inputs))
        }
        outputs = {
            str(trt_tensor.name): tensor_info(trt_tensor)
            for trt_tensor in map(network.get_output, range(network.num_outputs))
        }
        problems = []
        for kind, wanted, found in (
            ("input", self._source.inputs, inputs),
            ("output", self._source.outputs, outputs),
        ):
            for info in wanted:
                got = found.pop(info.name, None)
                if got is None:
                    problems.append(f"{kind} {info.name} is gone")
                elif got.dtype != info.dtype or (kind == "input" and not _fits(info, got)):
                    problems.append(f"{kind} {info} became {got}")
            problems.extend(f"{kind} {name} is new" for name in found)
        if problems:
            raise EngineBuildError(
                f"{self._source.path}: {self._library.name} reads it differently: "
                f"{'; '.join(problems)}",
                expected=(
                    "the graph's own inputs and outputs, because callers rely on their names, "
                    "types and shapes"
                ),
                fix="Change the graph to types that TensorRT has (no float64, no strings)",
            )

    def write(
        self,
        builder: TrtObject,
        network: TrtObject,
        options: BuildOptions,
        sink: FileSink,
        tracker: PhaseTracker,
    ) -> None:
        """Build the engine into ``sink``."""
        trt = self._library.trt
        config = self._configured(builder, options)
        self._mark_refittable(config, network, options)
        if options.timing_cache is not None:
            load_timing_cache(config, options.timing_cache, self._errors)
        config.progress_monitor = progress_monitor(trt, tracker)
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = stream_writer(trt, sink)
            built = builder.build_serialized_network_to_stream(network, config, writer)
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None and sink.write(memoryview(plan).tobytes()) > 0
        for problem in (tracker.problem, sink.problem):
            if problem is not None:
                raise problem
        # Errors logged by a build that succeeds are about kernels it then did not take.
        if not built or not sink.size_bytes:
            raise self._refusal("the build failed")
        if options.timing_cache is not None:
            save_timing_cache(config, options.timing_cache)

    def _configured(self, builder: TrtObject, options: BuildOptions) -> TrtObject:
        trt = self._library.trt
        config = builder.create_builder_config()
        if options.tf32:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)
        self._check("setting TF32", config.get_flag(trt.BuilderFlag.TF32) == options.tf32)
        self._limit(config, options)
        self._make_portable(config, options)
        for number, profile in enumerate(options.profiles, start=1):
            optimization_profile = builder.create_optimization_profile()
            for name, (low, middle, high) in profile.shapes.items():
                optimization_profile.set_shape(name, low, middle, high)
            index = config.add_optimization_profile(optimization_profile)
            self._check(f"adding profile {number}", index == number - 1)
        if options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
            for index, name in enumerate(options.compute_capabilities):
                target = getattr(trt.ComputeCapability, member_name(name))
                taken = config.set_compute_capability(target, index)
                self._check(f"targeting compute capability {name}", taken)
        self._check("configuring the build")
        return config

    def _limit(self, config: TrtObject, options: BuildOptions) -> None:
        trt = self._library.trt
        if options.workspace_bytes is not None:
            pool = trt.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, options.workspace_bytes)
            taken = config.get_memory_pool_limit(pool) == options.workspace_bytes
            self._check(f"limiting the workspace to {options.workspace_bytes} bytes", taken)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
            taken = config.builder_optimization_level == options.optimization_level
            self._check(f"setting optimization level {options.optimization_level}", taken)

    def _make_portable(self, config: TrtObject, options: BuildOptions) -> None:
        trt = self._library.trt
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            taken = config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            self._check("asking for version compatibility", taken)
        if options.hardware_compatibility is not None:
            level = {
                "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
                "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
            }[options.hardware_compatibility]
            config.hardware_compatibility_level = level
            taken = config.hardware_compatibility_level == level
            self._check(f"asking for {options.hardware_compatibility} engines", taken)

    def _mark_refittable(
        self, config: TrtObject, network: TrtObject, options: BuildOptions
    ) -> None:
        """Ask for an engine without its weights, or with weights that may change."""
        trt = self._library.trt
        if options.strip_weights:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            self._check("leaving the weights out", config.get_flag(trt.BuilderFlag.STRIP_PLAN))
        if options.refit:
            config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
            taken = config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
            self._check("asking for weights that may change", taken)
        for name in options.refittable:
            taken = network.mark_weights_refittable(name)
            self._check(f"letting weight {name} change", bool(taken))

    def _check(self, doing: str, succeeded: bool = True) -> None:
        if self._errors or not succeeded:
            raise self._refusal(f"{doing} failed")

    def _refusal(self, found: str) -> EngineBuildError:
        said = "; ".join(self._errors) or "it gave no reason"
        return EngineBuildError(
            f"{self._source.path}: {self._library.name} {self._library.version}: {found}: {said}",
            expected="a graph and options that it can build",
            fix="Rerun with -vv for its whole log",
        )

    def _parse_refusal(self, parser: TrtObject) -> EngineBuildError:
        problems = []
        for index in range(parser.num_errors):
            parser_error = parser.get_error(index)
            stack = [*parser_error.local_function_stack()]
            inside = f" in function {' > '.join(stack)}" if stack else ""
            node = f"{parser_error.node_name() or 'unnamed'} ({parser_error.node_operator()})"
            problems.append(f"node {node}{inside}: {parser_error.desc()}")
        if not problems:
            return self._refusal("the graph was refused")
        return EngineBuildError(
            f"{self._source.path}: {self._library.name} {self._library.version} refuses "
            f"{len(problems)} of its nodes: {'; '.join(problems)}",
            expected="operators that its ONNX parser knows, without plugins",
            fix="Export the graph with stock operators",
        )


def _creation_flags(trt: ModuleType) -> int:
    # From 11 on networks are always strongly typed, and the flag may go.
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _fits(wanted: TensorInfo, found: TensorInfo) -> bool:
    return len(wanted.shape) == len(found.shape) and all(
        isinstance(want, str) == isinstance(got, str) and (isinstance(want, str) or want == got)
        for want, got in zip(wanted.shape, found.shape, strict=True)
    )
