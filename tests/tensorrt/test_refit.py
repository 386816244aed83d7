"""Refit: the others' engines from the first task's, and everything that must not pass.

The library is a stand-in (``fake_tensorrt``), because refitting needs a GPU; that the calls
exist in the real one is ``test_tensorrt_api_lint``'s to say, and ``tests/gpu`` runs them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mtl_export.errors import EngineBuildError, MtlExportError, UsageError
from mtl_export.tensorrt import EngineManifest, default_profile
from mtl_export.tensorrt.differences import differing_weights
from mtl_export.tensorrt.job import EngineOrder, EnginePart, with_changing_weights
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.refit import LIKE_PLAIN, ROUND_TRIP, EngineBuilder
from tests.tensorrt import fake_tensorrt
from tests.tensorrt.fake_tensorrt import FakeEngine, FakeTensorRT
from tests.tensorrt.models import write_merged, write_routed

MERGED = ("dense.weight", "head.weight")


def write_tasks(folder: Path) -> list[Path]:
    """Write three tasks that share all but two matrices."""
    paths = [write_merged(folder / str(seed), external=False) for seed in range(3)]
    for seed, path in enumerate(paths):
        model = onnx.load(path)
        random = np.random.default_rng(seed)
        for tensor in model.graph.initializer:
            if tensor.name in MERGED:
                values = random.standard_normal(list(tensor.dims)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        path.write_bytes(model.SerializeToString())
    return paths


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return the graphs of three tasks."""
    return write_tasks(tmp_path / "onnx")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Return the library that builds in this test."""
    library = FakeTensorRT()
    fake_tensorrt.install(monkeypatch, library)
    return library


def options_for(paths: list[Path], *weights: str) -> BuildOptions:
    """Return options that let ``weights`` change, by default those that differ."""
    profile = default_profile(paths[0], max_batch=4, max_sequence=16)
    names = weights or differing_weights(paths)[paths[0]]
    return BuildOptions(profiles=(profile,), refit=True, refittable=names)


def build_all(paths: list[Path], options: BuildOptions) -> list[tuple[Path, EngineManifest]]:
    """Return every task's engine and manifest."""
    builds, built = EngineBuilder(), []
    for path in paths:
        engine = path.with_name("model.engine")
        built.append((engine, builds.build(path, engine, options)))
    return built


def test_exactly_the_merged_matrices_differ(paths: list[Path]) -> None:
    """Neither embeddings nor biases nor shapes are let change."""
    assert differing_weights(paths) == dict.fromkeys(paths, MERGED)
    assert differing_weights(paths[:1]) == {paths[0]: ()}


def test_each_engine_is_its_tasks_and_remains_refittable(
    trt: FakeTensorRT, paths: list[Path]
) -> None:
    """Weights, answers, hashes and provenance are those of the task's own graph."""
    built = build_all(paths, options_for(paths))
    for path, (file, manifest) in zip(paths, built, strict=True):
        engine = FakeEngine(trt, None, file.read_bytes())
        assert engine.model.graph == onnx.load(path).graph
        assert tuple(engine.changing) == MERGED
        assert manifest.engine_size_bytes == file.stat().st_size
        assert sorted(manifest.source_sha256) == ["model.onnx"]
        assert manifest.options["refittable"] == list(MERGED)
        assert sorted(one.name for one in file.parent.iterdir()) == ["model.engine", "model.onnx"]
    hashes = [manifest.source_sha256["model.onnx"] for _, manifest in built]
    assert len(set(hashes)) == 3
    checks = [[check.check for check in manifest.validated] for _, manifest in built]
    assert [LIKE_PLAIN in names for names in checks] == [True, False, False]
    assert [ROUND_TRIP in names for names in checks] == [False, True, True]
    # The last check is the one that says whether the engine was run.
    assert {names[-1] for names in checks} == {"its outputs equal the graph's"}


def test_only_the_named_weights_are_marked(trt: FakeTensorRT, paths: list[Path]) -> None:
    """REFIT_INDIVIDUAL is asked for; without refit no flag of it is set."""
    build_all(paths[:1], options_for(paths))
    assert trt.given["flags"] == set()  # the plain engine was built last, to compare with
    marked = FakeEngine(trt, None, paths[0].with_name("model.engine").read_bytes()).changing
    assert tuple(marked) == MERGED


def test_weights_fused_with_the_changed_ones_are_given_again(
    trt: FakeTensorRT, paths: list[Path]
) -> None:
    """The engine asks for an unchanged bias; the graph has it."""
    trt.faults.fused = {"dense.weight": {"dense.bias"}}
    (_, (file, _), _) = build_all(paths, options_for(paths))
    assert FakeEngine(trt, None, file.read_bytes()).model.graph == onnx.load(paths[1]).graph


@pytest.mark.parametrize(
    ("faults", "task", "message"),
    [
        ({"folded": {"head.weight"}}, 0, "head.weight cannot change: the builder folded"),
        ({"loses": "dense.bias"}, 0, "off by .* lose a bias"),
        ({"ignored": {"REFIT_INDIVIDUAL"}}, 0, "REFIT_INDIVIDUAL is not available"),
        ({"deaf": set(MERGED)}, 1, "answers as the first task does"),
        ({"residue": "head.weight"}, 1, "refitted back, the engine does not answer as"),
        ({"unnamed": "val_61"}, 1, "val_61 are not in the graph"),
        ({"fails": {"refit_from_file"}}, 1, "were not taken: refit_from_file is out of"),
        ({"fails": {"refit_cuda_engine"}}, 1, "were not taken: refit_cuda_engine is out of"),
        ({"fails": {"serialize_with_config"}}, 1, "cannot be written out: serialize_with"),
    ],
)
def test_planted_faults_are_refused_and_leave_no_engine(
    trt: FakeTensorRT, paths: list[Path], faults: dict[str, object], task: int, message: str
) -> None:
    """Each of them would give a wrong engine, or none, without a word."""
    for name, value in faults.items():
        setattr(trt.faults, name, value)
    options, builds = options_for(paths), EngineBuilder()
    engines = [path.with_name("model.engine") for path in paths]
    for number in range(task):
        builds.build(paths[number], engines[number], options)
    with pytest.raises(EngineBuildError, match=message):
        builds.build(paths[task], engines[task], options)
    assert [one.name for one in engines[task].parent.iterdir()] == ["model.onnx"]


def test_after_a_failure_the_next_task_is_built_anew(trt: FakeTensorRT, paths: list[Path]) -> None:
    """Whose weights the engine held is not known: nothing is made from it again."""
    options, builds = options_for(paths), EngineBuilder()
    builds.build(paths[0], paths[0].with_name("model.engine"), options)
    trt.faults.residue = "head.weight"
    with pytest.raises(EngineBuildError):
        builds.build(paths[1], paths[1].with_name("model.engine"), options)
    trt.faults.residue = ""
    manifest = builds.build(paths[2], paths[2].with_name("model.engine"), options)
    assert LIKE_PLAIN in [check.check for check in manifest.validated]


def test_change_outside_the_named_weights_is_refused(trt: FakeTensorRT, paths: list[Path]) -> None:
    """The engine would keep the first task's head."""
    with pytest.raises(EngineBuildError, match=r"head\.weight differ, and were not to change"):
        build_all(paths, options_for(paths, "dense.weight"))


def test_other_structure_is_not_refitted(
    trt: FakeTensorRT, paths: list[Path], tmp_path: Path
) -> None:
    """Weights of the same names, another graph: it has an engine of its own to begin with."""
    other = write_merged(tmp_path / "other", external=False, pool_axis=-2)
    assert differing_weights([*paths, other]) == {**dict.fromkeys(paths, MERGED), other: ()}
    built = build_all([paths[0], other, paths[1]], options_for(paths))
    checks = [[check.check for check in manifest.validated] for _, manifest in built]
    assert [LIKE_PLAIN in names for names in checks] == [True, True, False]
    assert ROUND_TRIP in checks[2]


def test_graphs_of_a_job_are_told_which_weights_change(paths: list[Path], tmp_path: Path) -> None:
    """Those that their structure's graphs differ in; a graph alone of its kind is built plainly."""
    single = write_routed(tmp_path / "single", external=False)
    options = BuildOptions(profiles=(), refit=True)
    orders = [
        EngineOrder(path.parent.name, path, (EnginePart(path, "model.engine", options),), 1)
        for path in (single, *paths)
    ]
    told = [one.parts[0].options for one in with_changing_weights(orders)]
    assert [one.refit for one in told] == [False, True, True, True]
    assert [tuple(one.refittable) for one in told] == [(), MERGED, MERGED, MERGED]
    with pytest.raises(UsageError, match="there are no weights to change"):
        with_changing_weights(orders[:2])


def test_quantised_graphs_are_refused(trt: FakeTensorRT, paths: list[Path]) -> None:
    """Values and scales would have to change together."""
    for path in paths:
        model = onnx.load(path)
        model.graph.node[0].op_type = "DequantizeLinear"
        path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineBuildError, match="it is quantised"):
        differing_weights(paths)
    with pytest.raises(EngineBuildError, match="it is quantised"):
        build_all(paths, options_for(paths, *MERGED))


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("11.3.0.1", {}, "can lose biases"),
        ("11.4.0.106", {"strip_weights": True}, "stripped weights: refit was chosen as well"),
    ],
)
def test_requests_that_cannot_go_well_are_refused_before_building(
    monkeypatch: pytest.MonkeyPatch,
    paths: list[Path],
    version: str,
    changes: dict[str, object],
    message: str,
) -> None:
    """A release known to drop biases, stripping beside refit."""
    fake_tensorrt.install(monkeypatch, FakeTensorRT(version))
    values = {"profiles": options_for(paths).profiles, "refit": True, "refittable": MERGED}
    options = BuildOptions(**{**values, **changes})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        EngineBuilder().build(paths[0], paths[0].with_name("model.engine"), options)


def test_rtx_says_why_it_does_not_refit(paths: list[Path]) -> None:
    """No GPU is needed to be told, and building again is as fast."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    with pytest.raises(MtlExportError, match="it refits only on a GPU"):
        EngineBuilder("tensorrt_rtx").build(
            paths[0], paths[0].with_name("model.engine"), options_for(paths)
        )
