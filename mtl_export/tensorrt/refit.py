"""One task's engine -> the engines of the others, by changing its weights.

The first task's graph is built with ``REFIT_INDIVIDUAL`` on exactly the matrices in which
the graphs differ; the others are made by giving these their own values. What would go
wrong without a word is looked for, because a refitted engine that kept another task's
matrix answers like that task:

    before     the graphs are quantised (scales and values would have to change together),
               or differ in more than weights; a release known to lose biases
    first      a matrix was folded away and cannot change; the engine answers otherwise than
               one built without refit
    each       a matrix that differs was not to change; the engine asks for a weight that
               the graph does not have; its answers are those of the first task, or after
               the way back the first task's are not

TensorRT with a GPU only. TensorRT-RTX builds as fast as it would refit.
Source: docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import shortened
from mtl_export.tensorrt.api import Library, TrtObject, load_library
from mtl_export.tensorrt.available import available_builder
from mtl_export.tensorrt.build import build_engine
from mtl_export.tensorrt.callbacks import Progress
from mtl_export.tensorrt.differences import (
    changed_weights,
    read_weights,
    refit_key,
    refused,
)
from mtl_export.tensorrt.manifest import EngineManifest, describe_engine, partial_path
from mtl_export.tensorrt.options import BuildOptions, check_options
from mtl_export.tensorrt.restore import give_weights, open_engine, write_with_weights
from mtl_export.tensorrt.runner import EngineSession
from mtl_export.tensorrt.source import read_source

# |refittable - plain| / largest |plain|: other kernels round otherwise, a lost bias is far off.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
LIKE_PLAIN = "the refittable engine answers as one built without refit"
ROUND_TRIP = "refitted, it answers otherwise; refitted back, as the first task to the bit"


@dataclass(frozen=True)
class _First:
    """The engine that the others are made from.

    Attributes:
        path: Its graph.
        options: It was built with these.
        manifest: What it is.
        runtime: The engine lives in it.
        engine: On the GPU; holds its own weights between two builds.
        answers: To ``sample_inputs``, before anything was refitted.
    """

    path: Path
    options: BuildOptions
    manifest: EngineManifest
    runtime: TrtObject
    engine: TrtObject
    answers: Mapping[str, Array]


class EngineBuilder:
    """Builds one engine at a time; with refit the first of each structure, and the others from it.

    With refit, the options name the weights that may change (``differing_weights``).

    Args:
        library_name: ``tensorrt`` or ``tensorrt_rtx`` instead of the better one here.

    Raises:
        BackendMissingError: No TensorRT can build here.
    """

    def __init__(self, library_name: str | None = None) -> None:
        self._info = available_builder(library_name)
        self._library = load_library(self._info.name)
        # A structure -> the first engine of it.
        self._firsts: dict[str, _First] = {}

    def build(
        self,
        onnx_path: Path,
        engine_path: Path,
        options: BuildOptions,
        progress: Progress | None = None,
    ) -> EngineManifest:
        """Return the manifest of the engine of ``onnx_path``, written to ``engine_path``.

        Raises:
            UsageError: An option does not fit, or this library cannot refit.
            EngineBuildError: The graph, the build or the refit was refused; no engine is left.
            OutputError: The engine cannot be written.
        """
        name = self._library.name
        if not options.refit:
            return build_engine(
                onnx_path, engine_path, options, progress=progress, library_name=name
            )
        check_options(self._library, options)
        key = refit_key(onnx_path)
        # Left out while it is refitted: after an error nobody knows whose weights it holds.
        first = self._firsts.pop(key, None)
        if first is None or first.options != options:
            first = self._build_first(onnx_path, engine_path, options, progress)
            manifest = first.manifest.with_check(LIKE_PLAIN)
        else:
            manifest = self._refitted(first, onnx_path, engine_path).with_check(ROUND_TRIP)
        self._firsts[key] = first
        return manifest

    def _build_first(
        self, onnx_path: Path, engine_path: Path, options: BuildOptions, progress: Progress | None
    ) -> _First:
        library = self._library
        manifest = build_engine(
            onnx_path, engine_path, options, progress=progress, library_name=library.name
        )
        try:
            runtime, engine = open_engine(library, engine_path)
            refitter = library.trt.Refitter(engine, library.log.handle)
            fixed = set(options.refittable) - set(refitter.get_all_weights())
            if fixed:
                raise refused(
                    onnx_path,
                    f"{shortened(sorted(fixed))} cannot change: the builder folded them away",
                    f"all of {shortened(options.refittable)} to be refittable",
                )
            answers = answers_of(library, engine_path, manifest)
            with TemporaryDirectory(prefix="mtl-export-") as folder:
                plain_path = Path(folder) / engine_path.name
                plain_options = replace(options, refit=False, refittable=())
                plain = build_engine(
                    onnx_path, plain_path, plain_options, library_name=library.name
                )
                _compare(onnx_path, manifest, answers, answers_of(library, plain_path, plain))
        except BaseException:
            engine_path.unlink(missing_ok=True)
            raise
        return _First(onnx_path, options, manifest, runtime, engine, answers)

    def _refitted(self, first: _First, onnx_path: Path, engine_path: Path) -> EngineManifest:
        """Refit to the weights of ``onnx_path``, write, check, and refit back."""
        changed = changed_weights(read_weights(first.path), read_weights(onnx_path))
        kept = changed - set(first.options.refittable)
        if kept:
            raise refused(
                onnx_path,
                f"{shortened(sorted(kept))} differ, and were not to change",
                f"no other change than in {shortened(first.options.refittable)}",
            )
        partial = partial_path(engine_path)
        back = engine_path.with_name(f".{engine_path.name}.back")
        try:
            give_weights(self._library, first.engine, onnx_path)
            manifest = describe_engine(
                engine_path,
                sha256=write_with_weights(self._library, first.engine, partial),
                source=read_source(onnx_path),
                info=self._info,
                options=first.options,
                precision=first.manifest.precision,
            )
            answers = answers_of(self._library, partial, manifest)
            give_weights(self._library, first.engine, first.path)
            write_with_weights(self._library, first.engine, back)
            returned = answers_of(self._library, back, first.manifest)
            if changed and _equal(first.answers, answers):
                raise refused(
                    onnx_path,
                    "refitted, the engine answers as the first task does",
                    f"other answers, since {shortened(sorted(changed))} differ",
                )
            if not _equal(first.answers, returned):
                raise refused(
                    onnx_path,
                    "refitted back, the engine does not answer as the first task did",
                    "the same answers to the bit, and nothing of another task left behind",
                )
            os.replace(partial, engine_path)
        finally:
            for file in (partial, back):
                with suppress(OSError):
                    file.unlink()
        return manifest


def answers_of(library: Library, path: Path, manifest: EngineManifest) -> dict[str, Array]:
    """Return what the engine at ``path`` answers to ``sample_inputs``, on the GPU.

    Raises:
        BackendMissingError: torch sees no CUDA device.
        EngineRunError: The engine cannot be opened or run.
        IntegrityError: It is not what its manifest says.
    """
    return EngineSession(library, path, manifest).run(sample_inputs(manifest), 0)


def sample_inputs(manifest: EngineManifest) -> dict[str, Array]:
    """Return the same inputs for every engine of a model: some tokens, all of them seen.

    Shapes are the first profile's best. Ids count 0 to 7, masks are 1, types and tasks 0,
    and numbers such as hidden states are seeded.
    """
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in manifest.inputs:
        shape = tuple(int(size) for size in tensor.shape if not isinstance(size, str))
        if tensor.is_dynamic:
            shape = manifest.profiles[0].shapes[tensor.name][1]
        values: Array
        if "mask" in tensor.name:
            values = np.ones(shape)
        elif tensor.name.endswith("input_ids"):
            values = np.arange(int(np.prod(shape))).reshape(shape) % 8
        elif "float" in tensor.dtype:
            values = random.standard_normal(shape) * 0.5
        else:
            values = np.zeros(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    return inputs


def _compare(
    path: Path,
    manifest: EngineManifest,
    answers: Mapping[str, Array],
    expected: Mapping[str, Array],
) -> None:
    """Refuse an engine that answers otherwise than one built without refit."""
    allowed = max(TOLERANCE.get(name, 0.0) for name in (*manifest.precision, "float32"))
    worst = max(
        float(np.abs(answers[name] - value).max() / max(np.abs(value).max(), 1e-30))
        for name, value in expected.items()
    )
    # NaN is no number below any limit.
    if not worst <= allowed:
        raise refused(
            path,
            f"the refittable engine is off by {worst:.2g} of the largest answer",
            f"at most {allowed:.2g}; some releases lose a bias when weights may change",
        )


def _equal(first: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in first.items())
