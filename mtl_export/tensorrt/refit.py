"""One task's engine -> the engines of the others, by changing its weights.

The first task's graph is built with ``REFIT_INDIVIDUAL`` on exactly the matrices in which
the graphs differ; the others are made by giving these their own values. What would go
wrong without a word is looked for, because a refitted engine that kept another task's
matrix answers like that task:

    before     the graphs are quantised (scales and values would have to change together),
               or differ in more than weights; a release known to lose biases
    first      a matrix was folded away and cannot change; the engine answers otherwise than
               one built without refit
    each       a matrix that differs was not to change; its type or count differs; the
               engine asks for a weight that the graph does not have; its answers are those
               of the first task, or after the way back the first task's are not

TensorRT with a GPU only. TensorRT-RTX builds as fast as it would refit.
Source: docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import shortened
from mtl_export.tensorrt.api import TrtObject, load_library
from mtl_export.tensorrt.available import available_builder
from mtl_export.tensorrt.build import build_with_options
from mtl_export.tensorrt.callbacks import Progress
from mtl_export.tensorrt.describe import describe_engine
from mtl_export.tensorrt.differences import (
    Values,
    changed_weights,
    read_weights,
    refit_key,
    refused,
)
from mtl_export.tensorrt.manifest import PASSED, BuildCheck, EngineManifest
from mtl_export.tensorrt.network import numpy_name
from mtl_export.tensorrt.opened import not_taken, open_engine, write_with_weights
from mtl_export.tensorrt.options import BuildOptions, check_options
from mtl_export.tensorrt.sample import answers_of
from mtl_export.tensorrt.source import read_source

# |refittable - plain| / largest |plain|: other kernels round otherwise, a lost bias is far off.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
LIKE_PLAIN = "the refittable engine answers as one built without refit"
ROUND_TRIP = "refitted, it answers otherwise; refitted back, as the first task to the bit"


class RefitBuilds:
    """Builds the first engine of each structure, and makes the others from it.

    The options of every call name the weights that may change (``differing_weights``).

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
        *,
        options: BuildOptions,
        progress: Progress | None = None,
    ) -> EngineManifest:
        """Return the manifest of the engine of ``onnx_path``, written to ``engine_path``.

        Raises:
            UsageError: An option does not fit, or this library cannot refit.
            EngineBuildError: The graph, the build or the refit was refused; no engine is left.
            OutputError: The engine cannot be written.
        """
        check_options(self._library, options)
        key = refit_key(onnx_path)
        master = self._firsts.get(key)
        if master is None or master.options != options:
            return self._build_first(key, onnx_path, engine_path, options, progress)
        with ExitStack() as open_files:
            first = read_weights(master.path, open_files)
            own = read_weights(onnx_path, open_files)
            kept = changed_weights(first, own) - set(options.refittable)
            if kept:
                raise refused(
                    onnx_path,
                    f"{shortened(sorted(kept))} differ, and were not to change",
                    f"no other change than in {shortened(options.refittable)}",
                    "the engine would keep the first task's values",
                )
            return self._refitted(master, onnx_path, engine_path, first, own)

    def _build_first(
        self,
        key: str,
        onnx_path: Path,
        engine_path: Path,
        options: BuildOptions,
        progress: Progress | None,
    ) -> EngineManifest:
        manifest = build_with_options(
            onnx_path,
            engine_path,
            options=options,
            progress=progress,
            library_name=self._info.name,
        )
        try:
            runtime, engine = open_engine(self._library, engine_path)
            refitter = self._library.trt.Refitter(engine, self._library.log.handle)
            fixed = set(options.refittable) - set(refitter.get_all_weights())
            if fixed:
                raise refused(
                    onnx_path,
                    f"{shortened(sorted(fixed))} cannot change: the builder folded them away",
                    f"all of {shortened(options.refittable)} to be refittable",
                    "every engine would answer with the first task's values",
                )
            answers = answers_of(self._library, engine_path, manifest)
            with TemporaryDirectory(prefix="mtl-export-") as folder:
                plain_path = Path(folder) / engine_path.name
                plain_options = replace(options, refit=False, refittable=())
                plain = build_with_options(
                    onnx_path, plain_path, options=plain_options, library_name=self._info.name
                )
                self._compare(onnx_path, manifest, answers, plain_path, plain)
        except BaseException:
            engine_path.unlink(missing_ok=True)
            raise
        self._firsts[key] = _First(onnx_path, key, options, manifest, runtime, engine, answers)
        return _with_check(manifest, LIKE_PLAIN)

    def _compare(
        self,
        onnx_path: Path,
        manifest: EngineManifest,
        answers: Mapping[str, Array],
        plain_path: Path,
        plain: EngineManifest,
    ) -> None:
        expected = answers_of(self._library, plain_path, plain)
        allowed = max(TOLERANCE.get(name, 0.0) for name in (*manifest.precision, "float32"))
        worst = max(
            float(np.abs(answers[name] - value).max() / max(np.abs(value).max(), 1e-30))
            for name, value in expected.items()
        )
        # NaN is no number below any limit.
        if not worst <= allowed:
            raise refused(
                onnx_path,
                f"the refittable engine is off by {worst:.2g} of the largest answer",
                f"at most {allowed:.2g} against an engine built without refit",
                "some releases lose a bias when weights may change",
            )

    def _refitted(
        self, master: _First, onnx_path: Path, engine_path: Path, first: Values, own: Values
    ) -> EngineManifest:
        """Refit to ``own``, write, check, and refit back to ``first``."""
        names = master.options.refittable
        partial = engine_path.with_name(f".{engine_path.name}.part")
        back = engine_path.with_name(f".{engine_path.name}.back")
        try:
            self._refit(master.engine, onnx_path, names, own)
            manifest = self._written(master, onnx_path, engine_path.name, partial)
            answers = answers_of(self._library, partial, manifest)
            self._refit(master.engine, master.path, names, first)
            again = self._written(master, master.path, engine_path.name, back)
            returned = answers_of(self._library, back, again)
            _check_round_trip(
                onnx_path, master.answers, answers, returned, changed_weights(first, own)
            )
            os.replace(partial, engine_path)
        except BaseException:
            # Whose weights the engine holds now is not known.
            del self._firsts[master.key]
            raise
        finally:
            for file in (partial, back):
                with suppress(OSError):
                    file.unlink()
        return _with_check(manifest, ROUND_TRIP)

    def _refit(self, engine: TrtObject, path: Path, names: Sequence[str], values: Values) -> None:
        """Give ``engine`` the ``values`` of ``names``, and of what depends on them."""
        with self._library.log.collect() as errors:
            refitter = self._library.trt.Refitter(engine, self._library.log.handle)
            for name in names:
                self._set(refitter, path, name, values, errors)
            # Weights that were fused with these: the same in every task, and asked for again.
            for name in sorted(refitter.get_missing_weights()):
                if name not in values:
                    raise refused(
                        path,
                        f"the engine asks for weight {name}, which the graph does not have",
                        "weights under the names of its initializers",
                        "without it the engine cannot be refitted",
                    )
                self._set(refitter, path, name, values, errors)
            if not refitter.refit_cuda_engine() or errors:
                raise not_taken(self._library, path, "the refit failed", errors)

    def _set(
        self, refitter: TrtObject, path: Path, name: str, values: Values, errors: list[str]
    ) -> None:
        array, dtype, count = values[name]
        prototype = refitter.get_weights_prototype(name)
        wanted = (numpy_name(prototype.dtype), prototype.size)
        if wanted != (dtype, count):
            raise refused(
                path,
                f"weight {name} has {count} values of {dtype}",
                f"{wanted[1]} of {wanted[0]}, as the engine was built with",
                "the engine would read other numbers",
            )
        new_weights = self._library.trt.Weights(prototype.dtype, array.ctypes.data, count)
        if not refitter.set_named_weights(name, new_weights) or errors:
            raise not_taken(self._library, path, f"weight {name} was not taken", errors)

    def _written(self, master: _First, onnx_path: Path, name: str, path: Path) -> EngineManifest:
        """Write the engine as it is now, with its weights; return its manifest."""
        sha256 = write_with_weights(self._library, master.engine, path)
        return describe_engine(
            path,
            engine_name=name,
            engine_sha256=sha256,
            source=read_source(onnx_path),
            info=self._info,
            options=master.options,
            precision=master.manifest.precision,
        )


@dataclass(frozen=True)
class _First:
    """The engine that the others are made from.

    Attributes:
        path: Its graph.
        key: The graph's structure.
        options: It was built with these.
        manifest: What it is.
        runtime: The engine lives in it.
        engine: On the GPU; holds its own weights between two builds.
        answers: To ``sample_inputs``, before anything was refitted.
    """

    path: Path
    key: str
    options: BuildOptions
    manifest: EngineManifest
    runtime: TrtObject
    engine: TrtObject
    answers: Mapping[str, Array]


def _check_round_trip(
    path: Path,
    before: Mapping[str, Array],
    answers: Mapping[str, Array],
    returned: Mapping[str, Array],
    changed: set[str],
) -> None:
    if changed and all(np.array_equal(before[name], answers[name]) for name in before):
        raise refused(
            path,
            "refitted, the engine answers as the first task does",
            f"other answers, since {shortened(sorted(changed))} differ",
            "the new weights did not reach the kernels",
        )
    if not all(np.array_equal(before[name], returned[name]) for name in before):
        raise refused(
            path,
            "refitted back, the engine does not answer as the first task did",
            "the same answers to the bit",
            "then a refit leaves something of another task behind",
        )


def _with_check(manifest: EngineManifest, check: str) -> EngineManifest:
    """Return the manifest with one more check that passed, before those that need a run."""
    done, last = manifest.validated[:-2], manifest.validated[-2:]
    return replace(manifest, validated=(*done, BuildCheck(check, PASSED), *last))
