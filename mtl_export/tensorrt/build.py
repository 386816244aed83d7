"""ONNX file -> engine file and its manifest.

One path for every TensorRT: strongly typed, so that precision is what the graph says;
TF32 off unless chosen; parsed by path, so that external data is mapped and not copied;
streamed to the file, so that memory holds the weights once. The file appears under
its name only when it is whole.

A cache of kernel timings belongs to one GPU and one release: another one's is refused. It
is read before the build and written afterwards, joined with what other builds have written
meanwhile, so that several jobs may share one file.

Not done here: INT8 calibrators and FP16 switches. Quantised and half graphs are built as
they are. Weights that may change afterwards are marked here, and changed in refit.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from mtl_export.errors import EngineBuildError, OutputError, UsageError
from mtl_export.tensorrt.api import Library, TrtObject, load_library
from mtl_export.tensorrt.available import available_builder
from mtl_export.tensorrt.callbacks import (
    FileSink,
    PhaseTracker,
    Progress,
    interrupts_kept,
    progress_monitor,
    stream_writer,
)
from mtl_export.tensorrt.manifest import (
    EngineManifest,
    describe_engine,
    partial_path,
    unwritable,
    write_whole,
)
from mtl_export.tensorrt.options import BuildOptions, check_options
from mtl_export.tensorrt.shapes import check_profiles
from mtl_export.tensorrt.source import OnnxSource, TensorInfo, numpy_name, read_source

# The same for every engine, so that engines of one structure share their graph part.
NETWORK_NAME = "mtl-export"
# Types of indices and masks, which say nothing about precision.
_NOT_PRECISION = {"bool", "int32", "int64"}


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    options: BuildOptions,
    *,
    progress: Progress | None = None,
    library_name: str | None = None,
) -> EngineManifest:
    """Return the manifest of the engine built from ``onnx_path`` into ``engine_path``.

    The manifest is the caller's to write: ``manifest.write(manifest_path(engine_path))``.

    Args:
        onnx_path: The graph; its external data is in the same folder.
        engine_path: The file to write; its folder is created.
        options: Profiles (``default_profile``, or from ``parse_shapes``) and the rest.
        progress: Called with the phase's name and the overall fraction; what it raises
            stops the build and is raised here.
        library_name: ``tensorrt`` or ``tensorrt_rtx`` instead of the better one here.

    Raises:
        BackendMissingError: No TensorRT can build here.
        UsageError: A profile or an option does not fit.
        EngineBuildError: The graph or the build was refused; every reason is named.
        OutputError: The engine cannot be written.
    """
    info = available_builder(library_name)
    source = read_source(onnx_path)
    library = load_library(info.name)
    check_profiles(source, options.profiles)
    check_options(library, options)
    partial = partial_path(engine_path)
    tracker = PhaseTracker(progress)
    with library.log.collect() as errors, interrupts_kept(tracker):
        steps = _Steps(source, library, errors)
        builder, network, parser = steps.parse()
        steps.compare_inputs_and_outputs(network)
        try:
            engine_path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                sink = FileSink(file)
                steps.write(builder, network, options, sink, tracker)
            manifest = describe_engine(
                engine_path,
                sha256=sink.sha256,
                source=source,
                info=info,
                options=options,
                precision=_precision_of(network),
            )
            os.replace(partial, engine_path)
        except OSError as error:
            if error is tracker.problem:
                raise
            raise unwritable(engine_path, error) from error
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

    def parse(self) -> tuple[TrtObject, TrtObject, TrtObject]:
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
        if not parser.parse_from_file(str(self._source.path)):
            raise self._parse_refusal(parser)
        return builder, network, parser

    def compare_inputs_and_outputs(self, network: TrtObject) -> None:
        """Refuse a network whose inputs or outputs are not those of the graph."""
        inputs = map(_tensor_info, map(network.get_input, range(network.num_inputs)))
        outputs = map(_tensor_info, map(network.get_output, range(network.num_outputs)))
        problems = []
        for kind, wanted, given in (
            ("input", self._source.inputs, inputs),
            ("output", self._source.outputs, outputs),
        ):
            found = {info.name: info for info in given}
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
                expected="the graph's own inputs and outputs, of the same types and shapes",
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
        for name in options.refittable:
            taken = network.mark_weights_refittable(name)
            self._check(f"letting weight {name} change", bool(taken))
        if options.timing_cache is not None:
            load_timing_cache(config, options.timing_cache, self._errors)
        config.progress_monitor = progress_monitor(trt, tracker)
        writer = stream_writer(trt, sink)
        built = builder.build_serialized_network_to_stream(network, config, writer)
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
        for flag, wanted, doing in (
            (trt.BuilderFlag.TF32, options.tf32, "setting TF32"),
            (
                trt.BuilderFlag.VERSION_COMPATIBLE,
                options.version_compatible,
                "asking for version compatibility",
            ),
            (trt.BuilderFlag.STRIP_PLAN, options.strip_weights, "leaving the weights out"),
            (trt.BuilderFlag.REFIT_INDIVIDUAL, options.refit, "asking for weights that may change"),
        ):
            if wanted:
                config.set_flag(flag)
            elif config.get_flag(flag):
                config.clear_flag(flag)
            self._check(doing, config.get_flag(flag) == wanted)
        self._limit(config, options)
        for number, profile in enumerate(options.profiles, start=1):
            optimization_profile = builder.create_optimization_profile()
            for name, (low, middle, high) in profile.shapes.items():
                optimization_profile.set_shape(name, low, middle, high)
            index = config.add_optimization_profile(optimization_profile)
            self._check(f"adding profile {number}", index == number - 1)
        if options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
            for index, name in enumerate(options.compute_capabilities):
                # 8.6 is SM86.
                target = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}")
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
        if options.hardware_compatibility is not None:
            level = {
                "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
                "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
            }[options.hardware_compatibility]
            config.hardware_compatibility_level = level
            taken = config.hardware_compatibility_level == level
            self._check(f"asking for {options.hardware_compatibility} engines", taken)

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


def _tensor_info(trt_tensor: TrtObject) -> TensorInfo:
    """Return a network tensor's description; dynamic dimensions have no name."""
    shape = tuple("" if size < 0 else int(size) for size in trt_tensor.shape)
    return TensorInfo(str(trt_tensor.name), numpy_name(trt_tensor.dtype), shape)


def _fits(wanted: TensorInfo, found: TensorInfo) -> bool:
    # A dynamic dimension has a name in the graph, and none in the network.
    return [size if isinstance(size, int) else "" for size in wanted.shape] == [*found.shape]


def _precision_of(network: TrtObject) -> tuple[str, ...]:
    """Return the element types that the network's layers produce, sorted."""
    found = set()
    for layer in map(network.get_layer, range(network.num_layers)):
        for trt_tensor in map(layer.get_output, range(layer.num_outputs)):
            if trt_tensor is not None:
                found.add(numpy_name(trt_tensor.dtype))
    return tuple(sorted(found - _NOT_PRECISION))


def load_timing_cache(config: TrtObject, path: Path, errors: list[str]) -> None:
    """Have ``config`` use the timings in ``path``; a missing file is an empty cache.

    Args:
        config: Of the build.
        path: The file.
        errors: Fills with what the library logs.

    Raises:
        UsageError: The file cannot be read, or its timings are not for this library and GPU.
    """
    timings = config.create_timing_cache(_stored_timings(path))
    taken = timings is not None and config.set_timing_cache(timings, False)
    if errors or not taken:
        raise UsageError(
            f"{path}: its timings are not taken: {'; '.join(errors) or 'TensorRT gave no reason'}",
            expected="a timing cache of this TensorRT release and this GPU, or no file yet",
            fix="Give another --timing-cache",
        )


def save_timing_cache(config: TrtObject, path: Path) -> None:
    """Write the timings that the build has used to ``path``, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    timings = config.get_timing_cache()
    # What another build has added since; a file that is no longer ours is left alone.
    if not timings.combine(config.create_timing_cache(_stored_timings(path)), False):
        raise OutputError(
            f"{path}: during the build it became the cache of another GPU or release",
            expected="a file that only builds for one GPU write",
            fix="Give each GPU and release a --timing-cache of its own",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error, "--timing-cache") from error
    write_whole(path, memoryview(timings.serialize()).tobytes(), "--timing-cache")


def _stored_timings(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UsageError(
            f"{path}: it cannot be read ({error.strerror or error})",
            expected="a timing cache, or no file yet",
            fix="Correct --timing-cache",
        ) from error
